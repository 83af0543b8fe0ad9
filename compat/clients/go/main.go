// Command client drives a server through etcd's own Go client: put, get, txn, watch, lease, lock.
// Usage: client ENDPOINT CA_FILE [USER PASSWORD], over TLS.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const prefix = "clients/go/"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "failed:", err)
		os.Exit(1)
	}
	fmt.Println("ok")
}

func run(args []string) error {
	if len(args) != 2 && len(args) != 4 {
		return fmt.Errorf("want ENDPOINT CA_FILE [USER PASSWORD]")
	}
	pem, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s holds no certificate", args[1])
	}
	config := clientv3.Config{
		Endpoints:   []string{args[0]},
		TLS:         &tls.Config{RootCAs: roots},
		DialTimeout: 10 * time.Second,
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if len(args) == 4 {
		config.Username, config.Password = args[2], args[3]+"-wrong"
		if client, err := clientv3.New(config); err == nil {
			client.Close()
			return fmt.Errorf("a wrong password was let in")
		}
		config.Password = args[3]
	}
	client, err := clientv3.New(config)
	if err != nil {
		return err
	}
	defer client.Close()

	for _, step := range []struct {
		name string
		run  func(context.Context, *clientv3.Client) error
	}{{"put, get", putGet}, {"txn", txn}, {"watch", watch}, {"lease", lease}, {"lock", lock}} {
		if err := step.run(ctx, client); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Println("done:", step.name)
	}
	_, err = client.Delete(ctx, prefix, clientv3.WithPrefix())
	return err
}

func putGet(ctx context.Context, client *clientv3.Client) error {
	if _, err := client.Put(ctx, prefix+"key", "value"); err != nil {
		return err
	}
	got, err := client.Get(ctx, prefix+"key")
	if err != nil {
		return err
	}
	if len(got.Kvs) != 1 || string(got.Kvs[0].Value) != "value" {
		return fmt.Errorf("got %v", got.Kvs)
	}
	return nil
}

func txn(ctx context.Context, client *clientv3.Client) error {
	for _, want := range []bool{true, false} {
		done, err := client.Txn(ctx).
			If(clientv3.Compare(clientv3.Value(prefix+"key"), "=", "value")).
			Then(clientv3.OpPut(prefix+"key", "changed")).
			Else(clientv3.OpGet(prefix + "key")).
			Commit()
		if err != nil {
			return err
		}
		if done.Succeeded != want {
			return fmt.Errorf("succeeded is %v, want %v", done.Succeeded, want)
		}
	}
	return nil
}

func watch(ctx context.Context, client *clientv3.Client) error {
	put, err := client.Put(ctx, prefix+"watched", "1")
	if err != nil {
		return err
	}
	events := client.Watch(ctx, prefix+"watched", clientv3.WithRev(put.Header.Revision))
	if _, err := client.Delete(ctx, prefix+"watched"); err != nil {
		return err
	}
	var seen []string
	for len(seen) < 2 {
		answer, ok := <-events
		if !ok || answer.Err() != nil {
			return fmt.Errorf("the watch ended: %v", answer.Err())
		}
		for _, event := range answer.Events {
			seen = append(seen, event.Type.String())
		}
	}
	if seen[0] != "PUT" || seen[1] != "DELETE" {
		return fmt.Errorf("saw %v", seen)
	}
	return nil
}

func lease(ctx context.Context, client *clientv3.Client) error {
	granted, err := client.Grant(ctx, 60)
	if err != nil {
		return err
	}
	if _, err := client.Put(ctx, prefix+"leased", "1", clientv3.WithLease(granted.ID)); err != nil {
		return err
	}
	if _, err := client.KeepAliveOnce(ctx, granted.ID); err != nil {
		return err
	}
	if _, err := client.Revoke(ctx, granted.ID); err != nil {
		return err
	}
	got, err := client.Get(ctx, prefix+"leased")
	if err != nil {
		return err
	}
	if len(got.Kvs) != 0 {
		return fmt.Errorf("the key outlived its lease")
	}
	return nil
}

func lock(ctx context.Context, client *clientv3.Client) error {
	session, err := concurrency.NewSession(client, concurrency.WithTTL(10))
	if err != nil {
		return err
	}
	defer session.Close()
	other, err := concurrency.NewSession(client, concurrency.WithTTL(10))
	if err != nil {
		return err
	}
	defer other.Close()
	held := concurrency.NewMutex(session, prefix+"lock")
	if err := held.Lock(ctx); err != nil {
		return err
	}
	wanted := concurrency.NewMutex(other, prefix+"lock")
	if err := wanted.TryLock(ctx); err != concurrency.ErrLocked {
		return fmt.Errorf("a second lock: %v", err)
	}
	if err := held.Unlock(ctx); err != nil {
		return err
	}
	if err := wanted.Lock(ctx); err != nil {
		return err
	}
	return wanted.Unlock(ctx)
}
