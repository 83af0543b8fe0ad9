//! Which releases may be in a cluster together. As in etcd, it is the cluster version of a release that counts, in its
//! major and minor numbers; a cluster is upgraded one minor version at a time, one member after the other.

use api::limits::ETCD_CLUSTER_VERSION;

/// Whether our release gets along with that of another member, or of one that wants to join or to found a cluster: at
/// most one minor version apart, either way. A release that does not say its cluster version is not judged.
pub(super) fn check_peer(theirs: &str) -> Result<(), String> {
    peers_fit(ETCD_CLUSTER_VERSION, theirs)
}

/// Whether our release may join a cluster of which a member says that it has this cluster version: the same one, or the
/// one before ours. A member that does not say it is not judged.
///
/// # Errors
/// Why not, for whoever starts this member.
pub(crate) fn check_join(cluster: &str) -> Result<(), String> {
    may_join(ETCD_CLUSTER_VERSION, cluster)
}

fn peers_fit(ours: &str, theirs: &str) -> Result<(), String> {
    let fit = match (parse(ours), parse(theirs)) {
        (Some(ours), Some(theirs)) => ours.0 == theirs.0 && ours.1.abs_diff(theirs.1) <= 1,
        _ => theirs.is_empty(),
    };
    if fit {
        return Ok(());
    }
    Err(format!(
        "incompatible with current running cluster: cluster version {theirs:?} where {ours} is, and members may be one minor version apart"
    ))
}

fn may_join(ours: &str, cluster: &str) -> Result<(), String> {
    let fits = match (parse(ours), parse(cluster)) {
        (Some(ours), Some(cluster)) => {
            ours.0 == cluster.0 && ours.1.checked_sub(cluster.1).is_some_and(|later| later <= 1)
        }
        _ => cluster.is_empty(),
    };
    if fits {
        return Ok(());
    }
    Err(format!(
        "incompatible with current running cluster: its cluster version is {cluster:?}, and a member that joins must have the same or the next minor version; this release has {ours}"
    ))
}

/// The major and the minor number of a version like `3.7.0`.
fn parse(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?.parse().ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_may_be_one_minor_version_apart() {
        for theirs in ["3.6.0", "3.7.0", "3.7.9", "3.8.0", ""] {
            assert_eq!(peers_fit("3.7.0", theirs), Ok(()), "{theirs}");
        }
        for theirs in ["3.5.0", "3.9.0", "2.7.0", "4.7.0", "3", "x", "3.-1.0"] {
            assert!(peers_fit("3.7.0", theirs).is_err(), "{theirs}");
        }
        assert_eq!(check_peer(ETCD_CLUSTER_VERSION), Ok(()));
    }

    #[test]
    fn a_joiner_has_the_clusters_version_or_the_next_one() {
        for cluster in ["3.6.0", "3.7.0", ""] {
            assert_eq!(may_join("3.7.0", cluster), Ok(()), "{cluster}");
        }
        for cluster in ["3.5.0", "3.8.0", "2.7.0", "4.7.0", "x"] {
            let text = may_join("3.7.0", cluster).unwrap_err();
            assert!(text.contains("incompatible with current running cluster"), "{text}");
        }
        assert_eq!(check_join(ETCD_CLUSTER_VERSION), Ok(()));
    }
}
