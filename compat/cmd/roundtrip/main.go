// Command roundtrip takes data from a real etcd to metastore and back, and compares what clients see on the way: every
// key at several revisions, leases, users, roles, permissions, and the hashes of the history.
//
//	etcd -> snapshot -> metastore -> snapshot -> etcd
//
// It also restores a copy of etcd's database file, bumps revisions, and has bad files refused. Exit code 1: something
// differs.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

var (
	etcdDir   = flag.String("etcd", "bin", "where etcd, etcdctl and etcdutl are")
	metastore = flag.String("metastore", "", "the binary of metastore")
	storage   = flag.String("storage", "rocksdb", "the engine of metastore: rocksdb or memory")
	keys      = flag.Int("keys", 100_000, "how many keys")
	users     = flag.Bool("users", true, "with users and roles, in force")
	keep      = flag.Bool("keep", false, "keep the data")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "roundtrip:", err)
		os.Exit(1)
	}
	fmt.Println("all equal")
}

func run() error {
	dir, err := os.MkdirTemp("", "roundtrip-")
	if err != nil {
		return err
	}
	if *keep {
		fmt.Println("data in", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	etcd := filepath.Join(*etcdDir, "etcd")

	// A real etcd, filled.
	var before *state
	began := time.Now()
	err = serve(etcd, in("etcd"), func(client *clientv3.Client, endpoint string) error {
		if err := fill(client, *keys); err != nil {
			return fmt.Errorf("filling etcd: %w", err)
		}
		report("filled etcd", began)
		if before, err = read(client); err != nil {
			return err
		}
		return save(endpoint, in("from-etcd.db"))
	})
	if err != nil {
		return err
	}
	if err := before.check(*keys); err != nil {
		return err
	}

	// Into metastore, in both forms.
	for _, file := range []struct {
		name, path string
		flags      []string
	}{
		{"snapshot", in("from-etcd.db"), nil},
		{"database file", in("etcd/member/snap/db"), []string{"--skip-hash-check"}},
	} {
		began = time.Now()
		target := in("metastore of " + file.name)
		if err := restore(file.path, target, file.flags...); err != nil {
			return err
		}
		report("restored etcd's "+file.name+" into metastore", began)
		err := serve(*metastore, target, func(client *clientv3.Client, endpoint string) error {
			after, err := read(client)
			if err != nil {
				return err
			}
			if err := before.compare(after); err != nil {
				return fmt.Errorf("etcd's %s in metastore: %w", file.name, err)
			}
			return save(endpoint, in("from-metastore.db"))
		})
		if err != nil {
			return err
		}
	}

	// And back.
	began = time.Now()
	saved := in("from-metastore.db")
	if err := command(filepath.Join(*etcdDir, "boltcheck"), saved); err != nil {
		return err
	}
	if err := equalStatus(saved); err != nil {
		return err
	}
	if err := equalHashes(in("from-etcd.db"), saved); err != nil {
		return err
	}
	etcdutl := filepath.Join(*etcdDir, "etcdutl")
	if err := command(etcdutl, "snapshot", "restore", saved, "--data-dir", in("etcd again")); err != nil {
		return err
	}
	report("restored metastore's snapshot into etcd", began)
	err = serve(etcd, in("etcd again"), func(client *clientv3.Client, _ string) error {
		after, err := read(client)
		if err != nil {
			return err
		}
		if err := before.compare(after); err != nil {
			return fmt.Errorf("metastore's snapshot in etcd: %w", err)
		}
		return goOn(client)
	})
	if err != nil {
		return err
	}
	if err := bumped(in, before); err != nil {
		return err
	}
	return badFiles(in)
}

// bumped restores with higher revisions, into metastore and, from there, into etcd.
func bumped(in func(string) string, before *state) error {
	target := in("bumped")
	if err := restore(in("from-etcd.db"), target, "--bump-revision", "1000000", "--mark-compacted"); err != nil {
		return err
	}
	check := func(client *clientv3.Client) error {
		after, err := read(client)
		if err != nil {
			return err
		}
		if after.revision != before.revision+1_000_000 {
			return fmt.Errorf("revision %d after bumping %d by a million", after.revision, before.revision)
		}
		if after.newest() != before.newest() {
			return fmt.Errorf("bumping the revision changed keys")
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		answer, ok := <-client.Watch(ctx, "a", clientv3.WithRev(before.revision))
		if !ok || answer.CompactRevision != after.revision {
			return fmt.Errorf("a watcher of the old cluster was told %+v", answer)
		}
		return nil
	}
	err := serve(*metastore, target, func(client *clientv3.Client, endpoint string) error {
		if err := check(client); err != nil {
			return err
		}
		return save(endpoint, in("bumped.db"))
	})
	if err != nil {
		return fmt.Errorf("bumped, in metastore: %w", err)
	}
	etcdutl := filepath.Join(*etcdDir, "etcdutl")
	if err := command(etcdutl, "snapshot", "restore", in("bumped.db"), "--data-dir", in("bumped etcd")); err != nil {
		return err
	}
	err = serve(filepath.Join(*etcdDir, "etcd"), in("bumped etcd"), func(client *clientv3.Client, _ string) error {
		return check(client)
	})
	if err != nil {
		return fmt.Errorf("bumped, in etcd: %w", err)
	}
	return nil
}

// badFiles has files refused that are no snapshots. Each with one line, and nothing is left of the attempt.
func badFiles(in func(string) string) error {
	good, err := os.ReadFile(in("from-metastore.db"))
	if err != nil {
		return err
	}
	flipped := append([]byte(nil), good...)
	flipped[len(flipped)/2] ^= 1
	for _, bad := range []struct {
		name    string
		content []byte
		flags   []string
		expect  string
	}{
		{"empty", nil, nil, "no hash"},
		{"text", []byte(strings.Repeat("no database\n", 5000)), []string{"--skip-hash-check"}, "not a bbolt database"},
		{"no hash", good[:len(good)-32], nil, "no hash"},
		{"truncated", good[:len(good)/2&^511+32], nil, "SHA-256"},
		{"truncated, unchecked", good[:len(good)/2&^511], []string{"--skip-hash-check"}, "truncated"},
		{"flipped", flipped, nil, "SHA-256"},
	} {
		path, target := in("bad.db"), in("bad")
		if err := os.WriteFile(path, bad.content, 0o600); err != nil {
			return err
		}
		err := restore(path, target, bad.flags...)
		if err == nil {
			return fmt.Errorf("bad file, %s: it was restored", bad.name)
		}
		text := strings.TrimSpace(err.Error())
		if !strings.Contains(text, bad.expect) || strings.Contains(text, "\n") {
			return fmt.Errorf("bad file, %s: %q, without %q", bad.name, text, bad.expect)
		}
		if _, err := os.Stat(target); !os.IsNotExist(err) {
			return fmt.Errorf("bad file, %s: something is left of the attempt", bad.name)
		}
	}
	return nil
}

func report(what string, began time.Time) {
	fmt.Printf("%s in %.1f s\n", what, time.Since(began).Seconds())
}
