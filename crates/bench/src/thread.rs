//! One thread of the generator: connections, the clients on them, and what they measured.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, LocalSet, spawn_local};

use crate::client::Client;
use crate::clock::{SECOND, instant, now};
use crate::keys::{KeyDealer, prefix_end};
use crate::load::{Load, Workload};
use crate::net::channel::Channel;
use crate::net::endpoint::Endpoint;
use crate::net::failure::{Failure, Kind};
use crate::net::security::Security;
use crate::pace::{PaceReport, Pacer, Schedule};
use crate::record::{Course, Recorder, Row, new_histogram};
use crate::usage::ThreadTime;
use crate::window::Window;
use crate::workload::Actor;
use crate::workload::kubernetes::{self, KubernetesActor};
use crate::workload::kv::KvActor;
use crate::workload::lease::{GrantActor, KeepAliveActor, LeaseIds};
use crate::workload::list::ListActor;
use crate::workload::swap::SwapActor;
use crate::workload::watch::{self, Fanout, WatchStream, WriterActor};

/// How often the thread checks how late it is itself, in nanoseconds.
const LAG_PERIOD: u64 = SECOND / 50;
/// How long events that are still under way are waited for, after the last put of a run with `--total`.
const SETTLE_MAX: Duration = Duration::from_secs(10);

/// What a thread is to do.
pub(crate) struct ThreadPlan {
    /// Which of the load's threads it is.
    pub(crate) index: usize,
    pub(crate) load: Arc<Load>,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) security: Security,
    pub(crate) window: Arc<Window>,
    pub(crate) ids: Arc<LeaseIds>,
    pub(crate) fanout: Arc<Fanout>,
    /// Told once everything is connected and prepared, or why it is not.
    pub(crate) ready: mpsc::UnboundedSender<Result<(), Failure>>,
    /// Says that the window is set; dropped if the run is off.
    pub(crate) go: oneshot::Receiver<()>,
}

/// What a thread measured.
pub(crate) struct ThreadReport {
    pub(crate) rows: Vec<Row>,
    pub(crate) course: Course,
    /// When the last measured operation ended.
    pub(crate) last: u64,
    pub(crate) pace: PaceReport,
    /// From the start of the window to the end of the last client.
    pub(crate) time: ThreadTime,
    /// How long that was, in nanoseconds.
    pub(crate) elapsed: u64,
    /// How late the thread came to what it meant to do at a given time, in nanoseconds; up to a millisecond of it is
    /// the timer's.
    pub(crate) lag: Histogram<u64>,
    pub(crate) reconnects: u64,
}

/// Runs a thread's part to its end; none if the run was called off.
pub(crate) fn run(plan: ThreadPlan) -> Option<ThreadReport> {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = plan.ready.send(Err(Failure::new(Kind::Connection, error)));
            return None;
        }
    };
    LocalSet::new().block_on(&runtime, run_clients(plan))
}

async fn run_clients(plan: ThreadPlan) -> Option<ThreadReport> {
    let setup = match Setup::new(&plan).await {
        Ok(setup) => setup,
        Err(failure) => {
            let _ = plan.ready.send(Err(failure));
            return None;
        }
    };
    let _ = plan.ready.send(Ok(()));
    plan.go.await.ok()?;

    let Setup {
        channels,
        recorder,
        pacer,
        actors,
    } = setup;
    let window = plan.window;
    let before = spawn_local({
        let from = instant(window.from());
        async move {
            tokio::time::sleep_until(from).await;
            (now(), ThreadTime::now())
        }
    });
    let lag = Rc::new(RefCell::new(new_histogram()));
    let lag_watcher = spawn_local(watch_lag(Arc::clone(&window), Rc::clone(&lag)));
    let dealing = spawn_local({
        let pacer = Rc::clone(&pacer);
        async move { pacer.deal().await }
    });
    tokio::time::sleep_until(instant(window.start())).await;
    let mut clients = JoinSet::new();
    for mut actor in actors {
        let pacer = Rc::clone(&pacer);
        clients.spawn_local(async move {
            while let Some(at) = pacer.next().await {
                if !actor.operate(at).await {
                    break;
                }
            }
        });
    }
    clients.join_all().await;
    if window.is_exhausted() && plan.load.workload == Workload::WatchFanout {
        let _ = tokio::time::timeout(SETTLE_MAX, async {
            while !plan.fanout.is_settled() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
    let (ended, time) = (now(), ThreadTime::now());
    lag_watcher.abort();
    if let Ok(Err(error)) = dealing.await {
        recorder
            .borrow_mut()
            .fail(0, window.from(), ended, &Failure::new(Kind::Protocol, error));
    }
    let (began, before) = if before.is_finished() {
        before.await.expect("it only sleeps")
    } else {
        (ended, time)
    };
    let mut recorder = recorder.borrow_mut();
    Some(ThreadReport {
        rows: std::mem::take(&mut recorder.rows),
        course: std::mem::replace(&mut recorder.course, Course::new()),
        last: recorder.last,
        pace: pacer.report(),
        time: time.since(before),
        elapsed: ended.saturating_sub(began),
        lag: lag.replace(new_histogram()),
        reconnects: channels.iter().map(|channel| channel.reconnects()).sum(),
    })
}

/// Measures how late this thread's own sleeps end within the window.
async fn watch_lag(window: Arc<Window>, lag: Rc<RefCell<Histogram<u64>>>) {
    let mut next = window.from();
    while next < window.until() {
        tokio::time::sleep_until(instant(next)).await;
        lag.borrow_mut().saturating_record(now().saturating_sub(next));
        next = now() + LAG_PERIOD;
    }
}

/// A thread's connections and clients, ready to go.
struct Setup {
    channels: Vec<Rc<Channel>>,
    recorder: Rc<RefCell<Recorder>>,
    pacer: Rc<Pacer>,
    actors: Vec<Actor>,
}

impl Setup {
    async fn new(plan: &ThreadPlan) -> Result<Self, Failure> {
        let load = &plan.load;
        let recorder = Recorder::new(Arc::clone(&plan.window), load.workload.labels());
        let recorder = Rc::new(RefCell::new(recorder));
        let mut channels = Vec::new();
        for connection in plan.own(load.connections) {
            let endpoint = plan.endpoints[connection % plan.endpoints.len()].clone();
            channels.push(Channel::open(endpoint, plan.security.clone(), load.timeout).await?);
        }
        plan.start_watchers(&channels, &recorder).await?;
        let schedule = load.rate.map(|rate| Schedule {
            rate,
            thread: plan.index as u64,
            threads: load.threads as u64,
        });
        let pacer = Rc::new(Pacer::new(Arc::clone(&plan.window), schedule));
        let dealer = KeyDealer::new(load.order, load.keys.count, plan.index, load.threads);
        let dealer = Rc::new(RefCell::new(dealer));
        let mut actors = Vec::new();
        for client in (0..load.clients).filter(|client| plan.owns(client % load.connections)) {
            let channel = &channels[client % load.connections / load.threads];
            let body = Client::new(Rc::clone(channel), Rc::clone(&recorder), Arc::clone(load), client);
            let mut actor = plan.actor(body, client, &dealer, pacer.is_open());
            actor.prepare().await?;
            actors.push(actor);
        }
        Ok(Setup {
            channels,
            recorder,
            pacer,
            actors,
        })
    }
}

impl ThreadPlan {
    /// Connections are dealt out to threads in turn.
    fn owns(&self, connection: usize) -> bool {
        connection % self.load.threads == self.index
    }

    /// The numbers below `count` that are this thread's.
    fn own(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        (self.index..count).step_by(self.load.threads)
    }

    fn actor(&self, client: Client, number: usize, dealer: &Rc<RefCell<KeyDealer>>, open_loop: bool) -> Actor {
        let window = Arc::clone(&self.window);
        let dealer = Rc::clone(dealer);
        match self.load.workload {
            Workload::Put
            | Workload::Get
            | Workload::GetSerializable
            | Workload::Range
            | Workload::Mixed
            | Workload::Delete => Actor::Kv(KvActor { client, dealer, window }),
            Workload::List => Actor::List(ListActor { client }),
            workload @ (Workload::CasOwn | Workload::CasHot) => Actor::Swap(SwapActor {
                client,
                window,
                number: if workload == Workload::CasHot { 0 } else { number as u64 },
                revision: 0,
            }),
            Workload::WatchLatency | Workload::WatchFanout => Actor::Writer(WriterActor {
                client,
                dealer,
                fanout: Arc::clone(&self.fanout),
                open_loop,
            }),
            Workload::LeaseGrant => Actor::Grant(GrantActor {
                client,
                ids: Arc::clone(&self.ids),
            }),
            Workload::LeaseKeepalive => Actor::KeepAlive(KeepAliveActor {
                client,
                ids: Arc::clone(&self.ids),
                lease: 0,
                stream: None,
            }),
            Workload::Kubernetes => Actor::Kubernetes(Box::new(KubernetesActor::new(client, window, number))),
        }
    }

    /// Starts this thread's share of the watchers and waits until they are there.
    async fn start_watchers(&self, channels: &[Rc<Channel>], recorder: &Rc<RefCell<Recorder>>) -> Result<(), Failure> {
        let load = &self.load;
        let kubernetes = load.workload == Workload::Kubernetes;
        let prefixes = if kubernetes {
            ["registry/pods/", "registry/leases/"]
        } else {
            ["keys/", "keys/"]
        };
        let mut waiting = Vec::new();
        for stream in (0..load.watch_streams.min(load.watchers)).filter(|stream| self.owns(stream % load.connections)) {
            let watches = (stream..load.watchers)
                .step_by(load.watch_streams)
                .map(|watcher| {
                    let prefix = format!("{}{}", load.prefix, prefixes[watcher % 2]);
                    let end = prefix_end(prefix.as_bytes());
                    (prefix.into(), end)
                })
                .collect();
            let stream = WatchStream {
                channel: Rc::clone(&channels[stream % load.connections / load.threads]),
                recorder: Rc::clone(recorder),
                label: if kubernetes { kubernetes::EVENT } else { watch::EVENT },
                values: load.values,
                watches,
                fanout: (!kubernetes).then(|| Arc::clone(&self.fanout)),
            };
            let (ready, is_ready) = oneshot::channel();
            spawn_local(stream.run(ready));
            waiting.push(is_ready);
        }
        for is_ready in waiting {
            match tokio::time::timeout(load.timeout, is_ready).await {
                Ok(result) => result.expect("a watch stream says how it went")?,
                Err(_) => return Err(Failure::new(Kind::Timeout, "watchers were not created in time")),
            }
        }
        Ok(())
    }
}
