//! How a call says on whose behalf it is made.

use std::sync::Arc;

/// What a client showed of itself. Nothing in it is verified yet but the certificate: the store does that, the same way
/// whatever the protocol (see [`crate::Store::on_behalf_of`]).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// A token that the store gave out, without a scheme in front of it. It counts before the certificate.
    pub token: Option<Arc<str>>,
    /// The common name of a client certificate that was verified against `--trusted-ca-file`, on a listener that demands
    /// one (`--client-cert-auth`).
    pub common_name: Option<Arc<str>>,
}

impl Credentials {
    /// Whether the client showed nothing at all.
    pub fn is_empty(&self) -> bool {
        self.token.is_none() && self.common_name.is_none()
    }
}

/// A token is a secret: it never gets into a log.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("common_name", &self.common_name)
            .finish()
    }
}
