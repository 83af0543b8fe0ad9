import static java.nio.charset.StandardCharsets.UTF_8;

import io.etcd.jetcd.ByteSequence;
import io.etcd.jetcd.ClientBuilder;
import io.etcd.jetcd.KeyValue;
import io.etcd.jetcd.Watch;
import io.etcd.jetcd.op.Cmp;
import io.etcd.jetcd.op.CmpTarget;
import io.etcd.jetcd.op.Op;
import io.etcd.jetcd.options.DeleteOption;
import io.etcd.jetcd.options.GetOption;
import io.etcd.jetcd.options.PutOption;
import io.etcd.jetcd.options.WatchOption;
import java.io.File;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * Drives a server through jetcd: put, get, txn, watch, lease, lock. Arguments: ENDPOINT CA_FILE [USER PASSWORD], over
 * TLS.
 */
public final class Client {
  private static final String PREFIX = "clients/java/";

  private static ByteSequence bytes(String text) {
    return ByteSequence.from(text, UTF_8);
  }

  private static ByteSequence key(String name) {
    return bytes(PREFIX + name);
  }

  private static <T> T get(Future<T> future) throws Exception {
    return future.get(15, TimeUnit.SECONDS);
  }

  private static void check(boolean condition, String text) {
    if (!condition) {
      throw new IllegalStateException(text);
    }
  }

  private static io.etcd.jetcd.Client connect(String[] args, String suffix) throws Exception {
    ClientBuilder builder = io.etcd.jetcd.Client.builder()
        .endpoints(args[0])
        .sslContext(ssl -> ssl.trustManager(new File(args[1])));
    if (args.length == 4) {
      builder.user(bytes(args[2])).password(bytes(args[3] + suffix));
    }
    return builder.build();
  }

  public static void main(String[] args) throws Exception {
    check(args.length == 2 || args.length == 4, "want ENDPOINT CA_FILE [USER PASSWORD]");
    if (args.length == 4) {
      boolean letIn = true;
      try (io.etcd.jetcd.Client wrong = connect(args, "-wrong")) {
        get(wrong.getKVClient().get(key("key")));
      } catch (Exception refused) {
        letIn = false;
      }
      check(!letIn, "a wrong password was let in");
    }
    try (io.etcd.jetcd.Client client = connect(args, "")) {
      putGet(client);
      txn(client);
      watch(client);
      lease(client);
      lock(client);
      get(client.getKVClient().delete(bytes(PREFIX), DeleteOption.builder().isPrefix(true).build()));
    }
    System.out.println("ok");
    System.exit(0);
  }

  private static void putGet(io.etcd.jetcd.Client client) throws Exception {
    get(client.getKVClient().put(key("key"), bytes("value")));
    List<KeyValue> kvs = get(client.getKVClient().get(key("key"))).getKvs();
    check(kvs.size() == 1 && kvs.get(0).getValue().toString(UTF_8).equals("value"), "put, get");
    System.out.println("done: put, get");
  }

  private static void txn(io.etcd.jetcd.Client client) throws Exception {
    for (boolean expected : new boolean[] {true, false}) {
      boolean succeeded = get(client.getKVClient().txn()
          .If(new Cmp(key("key"), Cmp.Op.EQUAL, CmpTarget.value(bytes("value"))))
          .Then(Op.put(key("key"), bytes("changed"), PutOption.DEFAULT))
          .Else(Op.get(key("key"), GetOption.DEFAULT))
          .commit()).isSucceeded();
      check(succeeded == expected, "txn");
    }
    System.out.println("done: txn");
  }

  private static void watch(io.etcd.jetcd.Client client) throws Exception {
    long revision = get(client.getKVClient().put(key("watched"), bytes("1"))).getHeader().getRevision();
    List<String> seen = new CopyOnWriteArrayList<>();
    CountDownLatch two = new CountDownLatch(2);
    WatchOption from = WatchOption.builder().withRevision(revision).build();
    try (Watch.Watcher watcher = client.getWatchClient().watch(key("watched"), from, answer ->
        answer.getEvents().forEach(event -> {
          seen.add(event.getEventType().name());
          two.countDown();
        }))) {
      get(client.getKVClient().delete(key("watched")));
      check(two.await(15, TimeUnit.SECONDS) && seen.equals(List.of("PUT", "DELETE")), "watch: " + seen);
    }
    System.out.println("done: watch");
  }

  private static void lease(io.etcd.jetcd.Client client) throws Exception {
    long id = get(client.getLeaseClient().grant(60)).getID();
    get(client.getKVClient().put(key("leased"), bytes("1"), PutOption.builder().withLeaseId(id).build()));
    check(get(client.getLeaseClient().keepAliveOnce(id)).getTTL() > 0, "lease: not kept alive");
    get(client.getLeaseClient().revoke(id));
    check(get(client.getKVClient().get(key("leased"))).getCount() == 0, "lease: the key outlived it");
    System.out.println("done: lease");
  }

  private static void lock(io.etcd.jetcd.Client client) throws Exception {
    long first = get(client.getLeaseClient().grant(10)).getID();
    long second = get(client.getLeaseClient().grant(10)).getID();
    ByteSequence held = get(client.getLockClient().lock(key("lock"), first)).getKey();
    CompletableFuture<ByteSequence> wanted =
        client.getLockClient().lock(key("lock"), second).thenApply(answer -> answer.getKey());
    boolean both = true;
    try {
      wanted.get(500, TimeUnit.MILLISECONDS);
    } catch (TimeoutException waits) {
      both = false;
    }
    check(!both, "lock: two hold it");
    get(client.getLockClient().unlock(held));
    get(client.getLockClient().unlock(get(wanted)));
    System.out.println("done: lock");
  }
}
