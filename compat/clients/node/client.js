// Drives a server through the package etcd3: put, get, txn, watch, lease, lock.
// Usage: client.js ENDPOINT CA_FILE [USER PASSWORD], over TLS.

const fs = require("fs");
const { Etcd3, EtcdLockFailedError } = require("etcd3");

const prefix = "clients/node/";

function check(condition, text) {
  if (!condition) throw new Error(text);
}

function connect(endpoint, ca, user, password) {
  const options = { hosts: [endpoint], credentials: { rootCertificate: fs.readFileSync(ca) } };
  if (user) options.auth = { username: user, password };
  return new Etcd3(options);
}

async function main(endpoint, ca, user, password) {
  if (user) {
    const wrong = connect(endpoint, ca, user, password + "-wrong");
    const let_in = await wrong.get("x").then(() => true, () => false);
    wrong.close();
    check(!let_in, "a wrong password was let in");
  }
  const client = connect(endpoint, ca, user, password);

  await client.put(prefix + "key").value("value");
  check((await client.get(prefix + "key").string()) === "value", "put, get");
  console.log("done: put, get");

  for (const expected of [true, false]) {
    const done = await client
      .if(prefix + "key", "Value", "==", "value")
      .then(client.put(prefix + "key").value("changed"))
      .else(client.get(prefix + "key"))
      .commit();
    check(done.succeeded === expected, "txn");
  }
  console.log("done: txn");

  const put = await client.put(prefix + "watched").value("1");
  const watcher = await client.watch().key(prefix + "watched").startRevision(put.header.revision).create();
  const seen = new Promise((resolve, reject) => {
    const events = [];
    const note = (kind) => {
      events.push(kind);
      if (events.length === 2) resolve(events);
    };
    watcher.on("put", () => note("put"));
    watcher.on("delete", () => note("delete"));
    setTimeout(() => reject(new Error("watch: only " + events)), 10000).unref();
  });
  await client.delete().key(prefix + "watched");
  check(String(await seen) === "put,delete", "watch");
  await watcher.cancel();
  console.log("done: watch");

  const lease = client.lease(60, { autoKeepAlive: false });
  await lease.put(prefix + "leased").value("1");
  await lease.keepaliveOnce();
  await lease.revoke();
  check((await client.get(prefix + "leased").string()) === null, "lease: the key outlived it");
  console.log("done: lease");

  const lock = client.lock(prefix + "lock").ttl(10);
  await lock.acquire();
  const second = await client.lock(prefix + "lock").acquire().catch((error) => error);
  check(second instanceof EtcdLockFailedError, "lock: two hold it");
  await lock.release();
  const other = client.lock(prefix + "lock");
  await other.acquire();
  await other.release();
  console.log("done: lock");

  await client.delete().prefix(prefix);
  client.close();
  console.log("ok");
}

const args = process.argv.slice(2);
if (args.length !== 2 && args.length !== 4) {
  console.error("want ENDPOINT CA_FILE [USER PASSWORD]");
  process.exit(2);
}
main(...args).catch((error) => {
  console.error("failed:", error);
  process.exit(1);
});
