//! The Cluster service.

use api::kv::{Member, ResponseHeader};
use api::{Error, Limits};
use metastore_frontend::Options;
use metastore_frontend::proto::etcdserverpb::cluster_client::ClusterClient;
use metastore_frontend::proto::etcdserverpb::{
    MemberAddRequest, MemberListRequest, MemberPromoteRequest, MemberRemoveRequest, MemberUpdateRequest,
};
use tonic::Code;
use tonic::transport::Channel;

use crate::fake::Fake;
use crate::{assert_status, connect};

/// Membership has no revision.
const HEADER: Option<ResponseHeader> = Some(ResponseHeader {
    cluster_id: 11,
    member_id: 12,
    revision: 0,
    raft_term: 13,
});

async fn client() -> (Fake, ClusterClient<Channel>) {
    let store = Fake::new(Limits::default());
    let channel = connect(store.clone(), Options::default()).await;
    (store, ClusterClient::new(channel))
}

fn urls(urls: &[&str]) -> Vec<String> {
    urls.iter().map(|&url| url.to_owned()).collect()
}

fn add(peer_urls: &[&str], is_learner: bool) -> MemberAddRequest {
    MemberAddRequest {
        peer_ur_ls: urls(peer_urls),
        is_learner,
    }
}

fn update(id: u64, peer_urls: &[&str]) -> MemberUpdateRequest {
    MemberUpdateRequest {
        id,
        peer_ur_ls: urls(peer_urls),
    }
}

#[tokio::test]
async fn members_come_and_go() {
    let (store, mut cluster) = client().await;
    let first = store.state().members[0].clone();

    let added = cluster
        .member_add(add(&["HTTP://b:2", " http://a:1"], true))
        .await
        .expect("adds")
        .into_inner();
    let learner = Member {
        id: 13,
        peer_urls: urls(&["http://a:1", "http://b:2"]),
        is_learner: true,
        ..Default::default()
    };
    assert_eq!(added.header, HEADER);
    assert_eq!(
        added.member,
        Some(learner.clone()),
        "what was asked for, in etcd's form"
    );
    assert_eq!(added.members.len(), 2);
    assert_eq!(added.members[0], first);

    let promoted = cluster.member_promote(MemberPromoteRequest { id: 13 }).await;
    let promoted = promoted.expect("promotes").into_inner();
    assert_eq!((promoted.header, promoted.members[1].is_learner), (HEADER, false));

    // The order and the spelling of an update stay.
    let updated = cluster.member_update(update(13, &["http://z:9", " HTTP://y:8 "])).await;
    let updated = updated.expect("updates").into_inner();
    assert_eq!(updated.header, HEADER);
    assert_eq!(updated.members[1].peer_urls, ["http://z:9", "HTTP://y:8"]);

    for linearizable in [false, true] {
        let listed = cluster.member_list(MemberListRequest { linearizable }).await;
        let listed = listed.expect("lists").into_inner();
        assert_eq!((listed.header, &listed.members), (HEADER, &updated.members));
    }

    let removed = cluster.member_remove(MemberRemoveRequest { id: 13 }).await;
    let removed = removed.expect("removes").into_inner();
    assert_eq!((removed.header, removed.members), (HEADER, vec![first]));
}

#[tokio::test]
async fn bad_urls_do_not_reach_the_store() {
    let (store, mut cluster) = client().await;
    let before = store.state().members.clone();
    let text = "etcdserver: given member URLs are invalid";
    for bad in [&[][..], &["nonsense"], &["http://a:1", "http://a:1/path"]] {
        let added = cluster.member_add(add(bad, false)).await;
        assert_status(added, Code::InvalidArgument, text);
        let updated = cluster.member_update(update(12, bad)).await;
        assert_status(updated, Code::InvalidArgument, text);
        let unknown = cluster.member_update(update(99, bad)).await;
        assert_status(unknown, Code::NotFound, "etcdserver: member not found");
    }
    assert_eq!(store.state().members, before);
}

#[tokio::test]
async fn refusals_keep_their_codes() {
    let (store, mut cluster) = client().await;
    let unknown = cluster.member_remove(MemberRemoveRequest { id: 99 }).await;
    assert_status(unknown, Code::NotFound, "etcdserver: member not found");
    let voter = cluster.member_promote(MemberPromoteRequest { id: 12 }).await;
    assert_status(
        voter,
        Code::FailedPrecondition,
        "etcdserver: can only promote a learner member",
    );
    for (error, code) in [
        (Error::PeerUrlExists, Code::FailedPrecondition),
        (Error::TooManyLearners, Code::FailedPrecondition),
        // etcd has no code for it.
        (Error::NotEnoughStarted, Code::Unknown),
        (Error::Unhealthy, Code::Unavailable),
    ] {
        store.state().failure = Some(error);
        let added = cluster.member_add(add(&["http://a:1"], false)).await;
        assert_status(added, code, error.message());
    }
    store.state().failure = Some(Error::LearnerNotReady);
    assert_status(
        cluster.member_promote(MemberPromoteRequest { id: 12 }).await,
        Code::FailedPrecondition,
        "etcdserver: can only promote a learner member which is in sync with leader",
    );
}
