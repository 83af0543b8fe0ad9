//! One node, or a cluster of three.

use std::time::{Duration, Instant};

use etcd_client::{Client, Permission};
use tempfile::TempDir;

use crate::client::Http;
use crate::support::{Node, PATIENT, Setup, Storage, code, free_port, status, temp_dir};

/// Turns auth on: root, and Ann, who may read and write what begins with `app/`; the password of both is `secret`.
pub(crate) async fn enable_auth(etcd: &mut Client) {
    for user in ["root", "ann"] {
        settle(async || etcd.user_add(user, "secret", None).await.map(drop)).await;
    }
    settle(async || etcd.user_grant_role("root", "root").await.map(drop)).await;
    settle(async || etcd.role_add("app").await.map(drop)).await;
    let app = || Permission::read_write("app/").with_prefix();
    settle(async || etcd.role_grant_permission("app", app()).await.map(drop)).await;
    settle(async || etcd.user_grant_role("ann", "app").await.map(drop)).await;
    settle(async || etcd.auth_enable().await.map(drop)).await;
}

/// Repeats what changes users or roles until the cluster has an answer. The first time may have been carried out.
async fn settle(mut change: impl AsyncFnMut() -> Result<(), etcd_client::Error>) {
    let begun = Instant::now();
    let mut is_again = false;
    while let Err(error) = change().await {
        let (code, message) = status(&error).unwrap_or_default();
        // Where auth is on already, whoever shows nothing is nobody.
        if is_again && (message.ends_with("already exists") || message.ends_with("user name is empty")) {
            return;
        }
        let is_unanswered = code == code::UNAVAILABLE && begun.elapsed() < Duration::from_secs(60);
        assert!(is_unanswered, "{error:?}");
        is_again = true;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Running members of one cluster.
pub(crate) struct Nodes {
    pub(crate) nodes: Vec<Node>,
    setups: Vec<Setup>,
    _dir: TempDir,
}

impl Nodes {
    /// Starts an empty cluster of this many members.
    pub(crate) fn start(storage: Storage, count: usize) -> Nodes {
        Nodes::start_with(storage, count, &[])
    }

    /// The same with more flags.
    pub(crate) fn start_with(storage: Storage, count: usize, args: &[&str]) -> Nodes {
        let dir = temp_dir();
        let peers: Vec<String> = (0..count)
            .map(|_| format!("http://127.0.0.1:{}", free_port()))
            .collect();
        let cluster: Vec<String> = peers
            .iter()
            .enumerate()
            .map(|(at, url)| format!("m{at}={url}"))
            .collect();
        let setups: Vec<Setup> = (0..count)
            .map(|at| {
                let base = dir.path().join(format!("m{at}"));
                std::fs::create_dir(&base).expect("a directory can be made");
                let setup = Setup::new(&base, storage)
                    .arg(format!("--name=m{at}"))
                    .arg(format!("--listen-peer-urls={}", peers[at]))
                    .arg(format!("--initial-advertise-peer-urls={}", peers[at]))
                    .arg(format!("--initial-cluster={}", cluster.join(",")));
                // Alone it needs no patience, which leases would have to have too.
                let patient = if count > 1 { &PATIENT[..] } else { &[] };
                let args = patient.iter().chain(args);
                args.fold(setup, |setup, arg| setup.arg(*arg))
            })
            .collect();
        let mut nodes: Vec<Node> = setups.iter().map(Setup::spawn).collect();
        for node in &mut nodes {
            node.wait_ready();
        }
        Nodes {
            nodes,
            setups,
            _dir: dir,
        }
    }

    /// Starts members that were stopped again, with the data that they had.
    pub(crate) fn start_again(&mut self, which: &[usize]) {
        for &at in which {
            self.nodes[at] = self.setups[at].spawn();
        }
        for &at in which {
            self.nodes[at].wait_ready();
        }
    }

    /// Where tests write by HTTP: another member than the one that they read from, if there are several.
    pub(crate) async fn http(&self) -> Http {
        Http::connect(self.nodes[0].url()).await
    }

    /// HTTP at the member that `etcd` uses.
    pub(crate) async fn other_http(&self) -> Http {
        Http::connect(self.nodes[self.nodes.len() - 1].url()).await
    }

    /// An etcd client of another member than `http` uses, if there are several.
    pub(crate) async fn etcd(&self) -> Client {
        self.nodes[self.nodes.len() - 1].client().await
    }
}
