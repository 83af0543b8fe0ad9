//! A proxy between two members, which cuts, stops and refuses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::harness::url;
use crate::peer::PeerUrl;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Open,
    /// Connections stay, and nothing goes through.
    Stuck,
    /// Connections are cut, and new ones at once.
    Shut,
}

pub(super) struct Proxy {
    pub(super) url: PeerUrl,
    way: watch::Sender<Way>,
    cuts: watch::Sender<u64>,
    /// Bytes after which a connection is cut; 0 for never. Asked for each new connection.
    budget: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub(super) async fn to(target: &PeerUrl) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let at = url(&format!("http://{}", listener.local_addr().expect("an address")));
        let target = target.to_string().replace("http://", "").replace("https://", "");
        let way = watch::Sender::new(Way::Open);
        let budget = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        let cuts = watch::Sender::new(0);
        let (ways, budgets, all_cuts) = (way.subscribe(), budget.clone(), cuts.subscribe());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (target, mut way, mut cuts) = (target.clone(), ways.clone(), all_cuts.clone());
                cuts.mark_unchanged();
                let budget = budgets.load(Ordering::SeqCst);
                connections.spawn(async move {
                    if *way.borrow() == Way::Shut {
                        return;
                    }
                    let Ok(server) = TcpStream::connect(target).await else {
                        return;
                    };
                    let (client_read, client_write) = client.into_split();
                    let (server_read, server_write) = server.into_split();
                    let ways = way.clone();
                    tokio::select! {
                        () = pump(client_read, server_write, ways.clone(), budget) => {}
                        () = pump(server_read, client_write, ways.clone(), 0) => {}
                        _ = way.wait_for(|way| *way == Way::Shut) => {}
                        _ = cuts.changed() => {}
                    }
                });
            }
        });
        Proxy {
            url: at,
            way,
            cuts,
            budget,
            _tasks: tasks,
        }
    }

    pub(super) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Cuts all connections that there are.
    pub(super) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts the connections that come from now on after so many bytes.
    pub(super) fn cut_after(&self, bytes: u64) {
        self.budget.store(bytes, Ordering::SeqCst);
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: watch::Receiver<Way>, budget: u64) {
    let mut buffer = vec![0; 64 << 10];
    let mut left = if budget == 0 { u64::MAX } else { budget };
    while left > 0 {
        if way.wait_for(|way| *way != Way::Stuck).await.is_err() {
            return;
        }
        let most = buffer.len().min(left as usize);
        match from.read(&mut buffer[..most]).await {
            Ok(read) if read > 0 => {
                left -= read as u64;
                if way.wait_for(|way| *way != Way::Stuck).await.is_err() || to.write_all(&buffer[..read]).await.is_err()
                {
                    return;
                }
            }
            _ => {
                // An end does not go through either.
                let _ = way.wait_for(|way| *way != Way::Stuck).await;
                // One direction may end before the other.
                let _ = to.shutdown().await;
                return std::future::pending().await;
            }
        }
    }
}
