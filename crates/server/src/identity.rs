//! Who a member and its cluster are: etcd's formulas, so that members, tools and tests agree on the ids.

use api::MemberId;
use sha1::{Digest, Sha1};

fn first_8_bytes(digest: impl AsRef<[u8]>) -> u64 {
    u64::from_be_bytes(digest.as_ref()[..8].try_into().expect("SHA-1 has 20 bytes"))
}

/// The id of a member that the cluster begins with: the first 8 bytes of the SHA-1 of its sorted peer URLs and the
/// cluster token.
pub fn member_id(peer_urls: &[String], cluster_token: &str) -> MemberId {
    let mut urls = peer_urls.to_vec();
    urls.sort();
    let mut hash = Sha1::new();
    for url in urls {
        hash.update(url.as_bytes());
    }
    hash.update(cluster_token.as_bytes());
    first_8_bytes(hash.finalize())
}

/// The id of a member that joins a running cluster: as that of a first member, with the time (seconds since 1970) in
/// place of the token, so that the same URLs get another id when they join again.
pub fn added_member_id(peer_urls: &[String], unix_s: u64) -> MemberId {
    member_id(peer_urls, &unix_s.to_string())
}

/// The id of a cluster: the first 8 bytes of the SHA-1 of its first members' ids, sorted, in big endian.
pub fn cluster_id(members: &[MemberId]) -> u64 {
    let mut members = members.to_vec();
    members.sort_unstable();
    let mut hash = Sha1::new();
    for id in members {
        hash.update(id.to_be_bytes());
    }
    first_8_bytes(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ids that a test of etcd's own (`TestCtlV3GetFormat`) has in its expected output.
    #[test]
    fn ids_are_those_of_etcd() {
        let member = member_id(&["https://localhost:20001".to_owned()], "new");
        assert_eq!(member, 0xa8_f345_8387_986d);
        assert_eq!(cluster_id(&[member]), 0x34c2_1a2d_427d_b393);
    }
}
