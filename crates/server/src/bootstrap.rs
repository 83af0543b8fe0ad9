//! How a member begins: with a new cluster, in an existing one, or where it left off.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::codec::{Action, MemberChange, MemberChangeKind, Operation, encode_operation};
use api::kv::Member;
use api::limits::METASTORE_VERSION;
use api::{MemberId, RaftIndex};
use mvcc::keys::FAMILIES;
use mvcc::{Machine, Membership};
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, HardState};
use storage::{AnyEngine, DataDir, Engine, Identity, RaftLog, StorageKind};

use crate::calls::{Answer, Ask, Empty, Members, decode_answer};
use crate::discovery::{self, DiscoveryOptions};
use crate::identity;
use crate::node::EnginePlace;
use crate::peer::{self, CallError, PeerUrl, RefuseReason};
use crate::serve::{EngineConfig, ServeError, ServerConfig};

/// How long one peer may take to say who belongs to the cluster.
const ASK_TIMEOUT: Duration = Duration::from_millis(700);
/// How often all peers are asked before a member gives up joining.
const ASK_ROUNDS: usize = 10;
/// The term of a cluster's first entries.
const FIRST_TERM: u64 = 1;

/// Who this member is, and what it knows before its own log says more.
pub(crate) struct Beginning {
    pub(crate) identity: Identity,
    /// The members that the log begins with; empty unless the cluster is new.
    pub(crate) founders: Vec<Member>,
    /// The members of the cluster that it joins.
    pub(crate) known: Vec<Member>,
    /// Whether it starts for the first time.
    pub(crate) is_first: bool,
}

/// Finds out who this member is.
///
/// # Errors
/// [`ServeError::Bootstrap`] with what is wrong and what to do.
pub(crate) async fn begin(
    config: &ServerConfig,
    storage: StorageKind,
    identity: Option<&Identity>,
    settings: &peer::Settings,
    tls: &peer::Tls,
) -> Result<Beginning, ServeError> {
    // As in etcd, what is on disk says who this member is; the flags only say so at its first start.
    if let Some(identity) = identity {
        let (founders, cluster_id) = founders(config);
        // A crash may have come between the identity and the log's first entries.
        let founds = !config.join && cluster_id == identity.cluster_id;
        return Ok(Beginning {
            identity: identity.clone(),
            founders: if founds { founders } else { Vec::new() },
            known: Vec::new(),
            is_first: false,
        });
    }
    let identity = |cluster_id, member_id| Identity {
        cluster_id,
        member_id,
        storage,
        created_by: format!("metastore {METASTORE_VERSION}"),
    };
    if config.join {
        if config.discovery.is_some() {
            return Err(ServeError::Bootstrap(
                "discovery URL should not be set when joining existing initial cluster".to_owned(),
            ));
        }
        let own = (config.name.as_str(), &config.initial_members);
        let others = config.initial_members.iter().filter(|(name, _)| **name != config.name);
        let urls = parsed(others.flat_map(|(_, urls)| urls));
        let (members, member_id) = ask_for_members(&urls, own, settings, tls).await?;
        return Ok(Beginning {
            identity: identity(members.cluster_id, member_id),
            founders: Vec::new(),
            known: members.members,
            is_first: true,
        });
    }
    let (founders, cluster_id) = found_members(config).await?;
    let member_id = identity::member_id(&config.initial_members[&config.name], &config.cluster_token);
    // A member whose data was lost must not begin anew under the same id: what it voted for is forgotten.
    let others = founders.iter().filter(|member| member.id != member_id);
    let urls = parsed(others.flat_map(|member| &member.peer_urls));
    let answers = futures::future::join_all(urls.iter().map(|url| ask_one(url, settings, tls))).await;
    for answer in answers {
        // One whose release does not get along with this one may know of a member that lost its data, and cannot be asked.
        let Some(members) = answer.map_err(ServeError::Bootstrap)? else {
            continue;
        };
        let known = members.members.iter().find(|member| member.id == member_id);
        if members.cluster_id == cluster_id && known.is_some_and(|member| !member.client_urls.is_empty()) {
            return Err(ServeError::Bootstrap(format!(
                "member {member_id:x} has already been bootstrapped; remove it from the cluster, add it again and start it with --initial-cluster-state=existing"
            )));
        }
    }
    Ok(Beginning {
        identity: identity(cluster_id, member_id),
        founders,
        known: Vec::new(),
        is_first: true,
    })
}

fn parsed<'a>(urls: impl Iterator<Item = &'a String>) -> Vec<PeerUrl> {
    urls.filter_map(|url| url.parse().ok()).collect()
}

/// The members that a new cluster begins with, in order of their ids, and the cluster's id; by a discovery service, if
/// there is one.
pub(crate) async fn found_members(config: &ServerConfig) -> Result<(Vec<Member>, u64), ServeError> {
    match &config.discovery {
        Some(discovery) => discover(config, discovery).await,
        None => Ok(founders(config)),
    }
}

/// Registers this member with a discovery service; returns the members that the new cluster begins with, in order of
/// their ids, and the cluster's id.
async fn discover(config: &ServerConfig, discovery: &DiscoveryOptions) -> Result<(Vec<Member>, u64), ServeError> {
    tracing::info!("Bootstrapping cluster using v3 discovery.");
    let urls = &config.initial_members[&config.name];
    let member_id = identity::member_id(urls, &config.cluster_token);
    let members = discovery::join(discovery, member_id, (&config.name, urls)).await;
    let members =
        members.map_err(|error| ServeError::Bootstrap(format!("failed to join discovery cluster ({error})")))?;
    Ok(first_members(&members, &config.cluster_token))
}

/// The members that a new cluster begins with, in order of their ids, and the cluster's id.
fn founders(config: &ServerConfig) -> (Vec<Member>, u64) {
    let (mut founders, cluster_id) = first_members(&config.initial_members, &config.cluster_token);
    if config.srv.is_some() {
        // DNS names hosts. A name that only its member knows must not be in the first entries, which are the same on all;
        // each member tells its own when it is published.
        founders.iter_mut().for_each(|member| member.name.clear());
    }
    (founders, cluster_id)
}

/// The members that a new cluster of these begins with, in order of their ids, and the cluster's id.
pub(crate) fn first_members(members: &InitialMembers, token: &str) -> (Vec<Member>, u64) {
    let mut members: Vec<Member> = members
        .iter()
        .map(|(name, urls)| Member {
            id: identity::member_id(urls, token),
            name: name.clone(),
            peer_urls: urls.clone(),
            ..Default::default()
        })
        .collect();
    members.sort_by_key(|member| member.id);
    let ids: Vec<MemberId> = members.iter().map(|member| member.id).collect();
    (members, identity::cluster_id(&ids))
}

/// Asks one peer who belongs to the cluster; `None` if it does not say.
///
/// # Errors
/// What it says if its release does not get along with this one.
async fn ask_one(url: &PeerUrl, settings: &peer::Settings, tls: &peer::Tls) -> Result<Option<Members>, String> {
    let ask = Ask::Members(Empty {}).into_bytes();
    match peer::call_url(settings, tls, url, 0, METASTORE_VERSION, ask, ASK_TIMEOUT).await {
        Ok(answer) => match decode_answer(answer) {
            Ok(Answer::Members(members)) => Ok(Some(members)),
            _ => Ok(None),
        },
        Err(CallError::Refused(refusal)) if refusal.reason == RefuseReason::Incompatible => {
            Err(format!("{url}: {}", refusal.text))
        }
        Err(_) => Ok(None),
    }
}

/// Asks one peer after the other who belongs to the cluster, until one knows of this member, which is `own`: its name and
/// the members that it was told of. One that lags behind does not know of it yet.
async fn ask_for_members(
    urls: &[PeerUrl],
    own: (&str, &InitialMembers),
    settings: &peer::Settings,
    tls: &peer::Tls,
) -> Result<(Members, MemberId), ServeError> {
    let mut failure = None;
    for _ in 0..ASK_ROUNDS {
        for url in urls {
            let members = match ask_one(url, settings, tls).await {
                // One that has only just joined itself knows nobody yet.
                Ok(Some(members)) if !members.members.is_empty() => members,
                Ok(_) => continue,
                Err(cause) => {
                    failure = Some(cause);
                    continue;
                }
            };
            let fits = peer::check_join(&members.cluster_version);
            match fits.and_then(|()| find_self(own, &members.members)) {
                Ok(id) => return Ok((members, id)),
                Err(cause) => failure = Some(cause),
            }
        }
        tokio::time::sleep(ASK_TIMEOUT / 2).await;
    }
    // What the last one said that said anything.
    let failure = failure.unwrap_or_else(|| {
        "cannot fetch cluster info from peer urls: could not retrieve cluster information from the given URLs; check --initial-cluster, and that the cluster is up".to_owned()
    });
    Err(ServeError::Bootstrap(failure))
}

/// Which of the cluster's members this one is: the one with its peer URLs.
fn find_self((name, initial_members): (&str, &InitialMembers), known: &[Member]) -> Result<MemberId, String> {
    let refuse = |cause: String| {
        Err(format!(
            "error validating peerURLs: {cause}; --initial-cluster must name every member of the cluster, this one included, as `member add` printed it"
        ))
    };
    if known.len() != initial_members.len() {
        return refuse(format!(
            "member count is unequal ({} in the cluster, {} in --initial-cluster)",
            known.len(),
            initial_members.len()
        ));
    }
    let sorted = |urls: &[String]| {
        let mut urls = urls.to_vec();
        urls.sort();
        urls
    };
    for urls in initial_members.values() {
        if !known.iter().any(|member| sorted(&member.peer_urls) == sorted(urls)) {
            return refuse(format!("unmatched member while checking PeerURLs {urls:?}"));
        }
    }
    let own = sorted(&initial_members[name]);
    let found = known.iter().find(|member| sorted(&member.peer_urls) == own);
    Ok(found.expect("every member was matched").id)
}

fn change_entry(index: RaftIndex, term: u64, change: &MemberChange) -> Entry {
    let kind = match change.kind() {
        MemberChangeKind::Remove => ConfChangeType::RemoveNode,
        MemberChangeKind::Add | MemberChangeKind::Promote => ConfChangeType::AddNode,
    };
    let operation = Operation::new(0, Action::MemberChange(change.clone()));
    let mut conf_change = ConfChange {
        node_id: change.member_id(),
        context: encode_operation(&operation),
        ..Default::default()
    };
    conf_change.set_change_type(kind);
    let mut entry = Entry {
        index,
        term,
        data: conf_change.write_to_bytes().expect("a Vec grows").into(),
        ..Default::default()
    };
    entry.set_entry_type(EntryType::EntryConfChange);
    entry
}

/// Begins the log of a new cluster, the same on all its first members: one committed entry for each of them.
pub(crate) fn found(log: &impl RaftLog, founders: &[Member]) -> Result<(), ServeError> {
    if log.last_index() > 0 || founders.is_empty() {
        return Ok(());
    }
    let entries: Vec<Entry> = founders
        .iter()
        .zip(1..)
        .map(|(member, index)| {
            let change = MemberChange {
                kind: MemberChangeKind::Add.into(),
                member: Some(member.clone()),
            };
            change_entry(index, FIRST_TERM, &change)
        })
        .collect();
    let hard_state = HardState {
        term: FIRST_TERM,
        commit: entries.len() as u64,
        ..Default::default()
    };
    log.append(&entries, Some(&hard_state), true)?;
    Ok(())
}

/// Finishes what a crash interrupted when a snapshot was put in use: the log begins right after it.
pub(crate) fn finish_install(log: &impl RaftLog, engine: &AnyEngine, snapshot: (u64, u64)) -> Result<(), ServeError> {
    let (index, term) = snapshot;
    let (applied, _, _) = Machine::<AnyEngine>::state_in(&engine.view())?;
    let fits = log.first_index() <= index + 1 && log.last_index() >= index && log.term(index).is_ok_and(|t| t == term);
    if applied != index || fits {
        return Ok(());
    }
    let mut hard_state = log.hard_state()?;
    if hard_state.term < term {
        (hard_state.term, hard_state.vote) = (term, 0);
    }
    hard_state.commit = index;
    log.reset(index, term, &hard_state)?;
    tracing::info!(snapshot_index = index, "finished an interrupted snapshot");
    Ok(())
}

/// Makes this member the only one of its cluster (`--force-new-cluster`): everything in its log counts as committed, and
/// then all others are removed.
pub(crate) fn force_new_cluster(log: &impl RaftLog, engine: &AnyEngine, id: MemberId) -> Result<(), ServeError> {
    let (applied, applied_term, mut membership) = Machine::<AnyEngine>::state_in(&engine.view())?;
    let hard_state = log.hard_state()?;
    let last = log.last_index();
    if last > applied {
        for entry in log.entries(applied + 1, last + 1, u64::MAX)? {
            if entry.get_entry_type() == EntryType::EntryConfChange {
                follow(&mut membership, &entry)?;
            }
        }
    }
    let term = hard_state.term.max(applied_term);
    let mut changes = Vec::new();
    let mut change = |kind: MemberChangeKind, member: &Member| {
        changes.push(MemberChange {
            kind: kind.into(),
            member: Some(member.clone()),
        });
    };
    match membership.get(id) {
        Some(member) if member.is_learner => change(MemberChangeKind::Promote, member),
        Some(_) => {}
        None => {
            return Err(ServeError::Bootstrap(format!(
                "--force-new-cluster: member {id:x} does not belong to the cluster in its data directory"
            )));
        }
    }
    for member in membership.members.iter().filter(|member| member.id != id) {
        change(MemberChangeKind::Remove, member);
    }
    let entries: Vec<Entry> = changes
        .iter()
        .zip(last + 1..)
        .map(|(change, index)| change_entry(index, term, change))
        .collect();
    let hard_state = HardState {
        term,
        vote: if term == hard_state.term { hard_state.vote } else { 0 },
        commit: last + entries.len() as u64,
        ..Default::default()
    };
    log.append(&entries, Some(&hard_state), true)?;
    tracing::warn!(
        removed = membership.members.len() - 1,
        "forced a new cluster of this member alone; remove --force-new-cluster before the next start"
    );
    Ok(())
}

/// Notes a change of members that is in the log and not applied yet.
fn follow(membership: &mut Membership, entry: &Entry) -> Result<(), ServeError> {
    let damaged = |cause: String| ServeError::Bootstrap(format!("log entry {} cannot be read: {cause}", entry.index));
    let change = ConfChange::parse_from_bytes(&entry.data).map_err(|error| damaged(error.to_string()))?;
    let operations = api::codec::decode_entry(&change.context).map_err(|error| damaged(error.to_string()))?;
    for operation in operations {
        if let Some(Action::MemberChange(change)) = operation.action {
            // One that is refused here is refused when it is applied as well.
            let _ = membership.change(&change);
        }
    }
    Ok(())
}

/// Where this member's engines live.
pub(crate) struct Place {
    pub(crate) data_dir: Arc<DataDir>,
    pub(crate) engine: EngineConfig,
}

/// Opens an engine with all families.
pub(crate) fn open_engine(config: &EngineConfig, dir: &Path) -> Result<AnyEngine, storage::EngineError> {
    match config {
        EngineConfig::Rocks(options) => AnyEngine::open_rocks(dir, FAMILIES, options),
        EngineConfig::Memory => AnyEngine::open_memory(dir, FAMILIES),
    }
}

impl Place {
    pub(crate) fn open(&self, dir: &Path) -> Result<AnyEngine, storage::EngineError> {
        open_engine(&self.engine, dir)
    }
}

impl EnginePlace<AnyEngine> for Place {
    fn stage(&self) -> Result<(AnyEngine, PathBuf), String> {
        let dir = self.data_dir.stage_engine().map_err(|error| error.to_string())?;
        let engine = self.open(&dir).map_err(|error| error.to_string())?;
        Ok((engine, dir))
    }

    fn switch(&self, dir: &Path, index: RaftIndex, term: u64) -> Result<(), String> {
        self.data_dir
            .switch_engine(dir, index, term)
            .map_err(|error| error.to_string())
    }

    fn remove(&self, dir: &Path) {
        if let Err(error) = std::fs::remove_dir_all(dir) {
            tracing::warn!(dir = %dir.display(), %error, "files that are of no more use were not removed; the next start does it");
        }
    }

    fn used(&self) -> PathBuf {
        self.data_dir.engine_dir().map(|engine| engine.path).unwrap_or_default()
    }
}

/// What the flags say about who founds a cluster, by name.
pub type InitialMembers = BTreeMap<String, Vec<String>>;

#[cfg(test)]
mod tests {
    use api::limits::ETCD_CLUSTER_VERSION;
    use bytes::Bytes;

    use super::*;
    use crate::calls::encode_answer;
    use crate::peer::{
        BoxFuture, Caller, Handler, Introduction, Listener, Refusal, SnapshotHeader, SnapshotSink, SocketOptions,
        Transport,
    };

    /// A member that knows who the members are, and nothing else.
    struct Told(Members);

    impl Handler for Told {
        fn admit(&self, _: &Introduction) -> Result<(), Refusal> {
            Ok(())
        }

        fn receive(&self, _: MemberId, _: Vec<Bytes>) -> BoxFuture<'_, ()> {
            Box::pin(async {})
        }

        fn call(&self, _: Caller, _: Bytes) -> BoxFuture<'_, Bytes> {
            Box::pin(async move { encode_answer(Ok(Answer::Members(self.0.clone()))) })
        }

        fn open_snapshot(&self, _: MemberId, _: &SnapshotHeader) -> Result<Box<dyn SnapshotSink>, Refusal> {
            Err(Refusal::new(RefuseReason::Busy, "no snapshots here"))
        }

        fn unreachable(&self, _: MemberId) {}

        fn refused(&self, _: MemberId, _: &Refusal) {}
    }

    fn member(id: MemberId, url: &str) -> Member {
        Member {
            id,
            peer_urls: vec![url.to_owned()],
            ..Default::default()
        }
    }

    /// Runs a member that says this.
    async fn run(members: &[Member], cluster_version: &str) -> (Transport, PeerUrl) {
        let anywhere = "http://127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind(&anywhere, &SocketOptions::default()).await.unwrap();
        let url = listener.local_url().parse().unwrap();
        let told = Told(Members {
            cluster_id: 7,
            members: members.to_vec(),
            cluster_version: cluster_version.to_owned(),
        });
        let transport = Transport::start(
            tokio::runtime::Handle::current(),
            peer::Identity {
                cluster_id: 7,
                member_id: 1,
                ..Default::default()
            },
            peer::Settings::default(),
            peer::Tls::default(),
            vec![listener],
            Arc::new(told),
        );
        (transport, url)
    }

    async fn ask(urls: &[PeerUrl]) -> Result<(Members, MemberId), String> {
        let names = [("a", "http://a:1"), ("b", "http://b:1")];
        let initial: InitialMembers = names
            .into_iter()
            .map(|(name, url)| (name.to_owned(), vec![url.to_owned()]))
            .collect();
        let (settings, tls) = (peer::Settings::default(), peer::Tls::default());
        let asked = ask_for_members(urls, ("b", &initial), &settings, &tls).await;
        asked.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_joiner_asks_on_where_it_is_not_known_yet() {
        let all = [member(1, "http://a:1"), member(2, "http://b:1")];
        let (_lagging, lags) = run(&all[..1], "").await;
        let (_empty, empty) = run(&[], "").await;
        let (_current, knows) = run(&all, ETCD_CLUSTER_VERSION).await;
        let (_newer, newer) = run(&all, "3.999.0").await;
        let (members, id) = ask(&[empty.clone(), lags.clone(), newer.clone(), knows]).await.unwrap();
        assert_eq!((members.cluster_id, members.members.len(), id), (7, 2, 2));
        // Where it may join nowhere, it says what it was told last.
        let (unknown, too_new, silent) = ([lags.clone(), empty.clone()], [lags, newer], [empty]);
        let (unknown, too_new, silent) = tokio::join!(ask(&unknown), ask(&too_new), ask(&silent));
        let unknown = unknown.unwrap_err();
        assert!(
            unknown.contains("member count is unequal (1 in the cluster, 2 in"),
            "{unknown}"
        );
        let too_new = too_new.unwrap_err();
        assert!(
            too_new.contains("incompatible with current running cluster"),
            "{too_new}"
        );
        let silent = silent.unwrap_err();
        assert!(silent.contains("cannot fetch cluster info from peer urls"), "{silent}");
    }
}
