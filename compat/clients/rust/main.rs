//! Drives a server through the crate `etcd-client`: put, get, txn, watch, lease, lock.
//! Usage: client ENDPOINT CA_FILE [USER PASSWORD], over TLS.

use std::error::Error;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, DeleteOptions, EventType, LockOptions, PutOptions,
    TlsOptions, Txn, TxnOp, WatchOptions,
};

const PREFIX: &str = "clients/rust/";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (endpoint, ca, login) = match &args[..] {
        [endpoint, ca] => (endpoint, ca, None),
        [endpoint, ca, user, password] => (endpoint, ca, Some((user.as_str(), password.as_str()))),
        _ => return Err("want ENDPOINT CA_FILE [USER PASSWORD]".into()),
    };
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(std::fs::read(ca)?));
    let mut options = ConnectOptions::new().with_tls(tls);
    if let Some((user, password)) = login {
        let wrong = options.clone().with_user(user, format!("{password}-wrong"));
        if Client::connect([endpoint], Some(wrong)).await.is_ok() {
            return Err("a wrong password was let in".into());
        }
        options = options.with_user(user, password);
    }
    let mut client = Client::connect([endpoint], Some(options)).await?;
    put_get(&mut client).await?;
    txn(&mut client).await?;
    watch(&mut client).await?;
    lease(&mut client).await?;
    lock(&mut client).await?;
    client.delete(PREFIX, Some(DeleteOptions::new().with_prefix())).await?;
    print("ok");
    Ok(())
}

fn print(line: &str) {
    println!("{line}");
}

async fn put_get(client: &mut Client) -> Result<()> {
    client.put(key("key"), "value", None).await?;
    let got = client.get(key("key"), None).await?;
    if got.kvs().len() != 1 || got.kvs()[0].value() != b"value" {
        return Err(format!("put, get: {:?}", got.kvs()).into());
    }
    print("done: put, get");
    Ok(())
}

async fn txn(client: &mut Client) -> Result<()> {
    for expected in [true, false] {
        let txn = Txn::new()
            .when([Compare::value(key("key"), CompareOp::Equal, "value")])
            .and_then([TxnOp::put(key("key"), "changed", None)])
            .or_else([TxnOp::get(key("key"), None)]);
        if client.txn(txn).await?.succeeded() != expected {
            return Err(format!("txn: succeeded is not {expected}").into());
        }
    }
    print("done: txn");
    Ok(())
}

async fn watch(client: &mut Client) -> Result<()> {
    let put = client.put(key("watched"), "1", None).await?;
    let revision = put.header().map_or(0, |header| header.revision());
    let from = WatchOptions::new().with_start_revision(revision);
    let mut stream = client.watch(key("watched"), Some(from)).await?;
    client.delete(key("watched"), None).await?;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let answer = stream.message().await?.ok_or("the watch ended")?;
        seen.extend(answer.events().iter().map(|event| event.event_type()));
    }
    if seen != [EventType::Put, EventType::Delete] {
        return Err(format!("watch: {seen:?}").into());
    }
    print("done: watch");
    Ok(())
}

async fn lease(client: &mut Client) -> Result<()> {
    let id = client.lease_grant(60, None).await?.id();
    client
        .put(key("leased"), "1", Some(PutOptions::new().with_lease(id)))
        .await?;
    let (mut keeper, mut kept) = client.lease_keep_alive(id).await?;
    keeper.keep_alive().await?;
    if kept.message().await?.is_none_or(|answer| answer.ttl() <= 0) {
        return Err("lease: not kept alive".into());
    }
    client.lease_revoke(id).await?;
    if client.get(key("leased"), None).await?.count() != 0 {
        return Err("lease: the key outlived it".into());
    }
    print("done: lease");
    Ok(())
}

async fn lock(client: &mut Client) -> Result<()> {
    let first = client.lease_grant(10, None).await?.id();
    let second = client.lease_grant(10, None).await?.id();
    let held = client
        .lock(key("lock"), Some(LockOptions::new().with_lease(first)))
        .await?;
    let mut other = client.clone();
    let wanted =
        tokio::spawn(async move { other.lock(key("lock"), Some(LockOptions::new().with_lease(second))).await });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    if wanted.is_finished() {
        return Err("lock: two hold it".into());
    }
    client.unlock(held.key()).await?;
    let taken = wanted.await??;
    client.unlock(taken.key()).await?;
    print("done: lock");
    Ok(())
}
