package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"sort"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	leases = 200
	page   = 5000
)

// fill writes keys, several revisions of each, deletes some, compacts in the middle, and adds leases, users and roles.
func fill(client *clientv3.Client, keys int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var ids [leases]clientv3.LeaseID
	for i := range ids {
		lease, err := client.Grant(ctx, int64(100_000+i))
		if err != nil {
			return err
		}
		ids[i] = lease.ID
	}
	var revision int64
	for round := range 4 {
		for first := 0; first < keys; first += 100 {
			var ops []clientv3.Op
			for number := first; number < min(first+100, keys); number++ {
				// Each round in another order, so that revisions are in no order of keys.
				number := (number*7919 + round*104_729) % keys
				name := fmt.Sprintf("key/%03d/%07d", number%500, number)
				switch {
				case round == 2 && number%10 == 3, round == 3 && number%25 == 4:
					ops = append(ops, clientv3.OpDelete(name))
				case number%50 == round:
					value := strings.Repeat(fmt.Sprint(number), 1+number%2000)
					ops = append(ops, clientv3.OpPut(name, value[:min(len(value), 6000)]))
				case number%20 == 7:
					ops = append(ops, clientv3.OpPut(name, fmt.Sprint("leased ", round), clientv3.WithLease(ids[number%leases])))
				default:
					ops = append(ops, clientv3.OpPut(name, fmt.Sprintf("value %d of %d", round, number)))
				}
			}
			answer, err := client.Txn(ctx).Then(ops...).Commit()
			if err != nil {
				return err
			}
			if revision = answer.Header.Revision; round == 2 && first >= keys/2 && first < keys/2+100 {
				if _, err := client.Compact(ctx, revision, clientv3.WithCompactPhysical()); err != nil {
					return err
				}
			}
		}
	}
	for _, id := range ids[:10] {
		if _, err := client.Revoke(ctx, id); err != nil {
			return err
		}
	}
	if !*users {
		return nil
	}
	for _, add := range []func() error{
		func() error { _, err := client.UserAdd(ctx, "root", password); return err },
		func() error { _, err := client.UserAdd(ctx, "reader", "read"); return err },
		func() error {
			_, err := client.UserAddWithOptions(ctx, "certificate", "", &clientv3.UserAddOptions{NoPassword: true})
			return err
		},
		func() error { _, err := client.RoleAdd(ctx, "root"); return err },
		func() error { _, err := client.RoleAdd(ctx, "reads"); return err },
		func() error {
			_, err := client.RoleGrantPermission(ctx, "reads", "key/001", "key/002", clientv3.PermissionType(clientv3.PermRead))
			return err
		},
		func() error {
			_, err := client.RoleGrantPermission(ctx, "reads", "own", "", clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := client.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := client.UserGrantRole(ctx, "reader", "reads"); return err },
		func() error { _, err := client.AuthEnable(ctx); return err },
	} {
		if err := add(); err != nil {
			return err
		}
	}
	return nil
}

// state is what clients see.
type state struct {
	revision, compacted int64
	keys                map[int64]int
	// By revision, of every key with its revisions, version, lease and value.
	contents map[int64]string
	hashes   map[int64]uint32
	// Sorted, one line each.
	leases, auth []string
}

func (s *state) newest() string {
	return s.contents[s.revision][strings.Index(s.contents[s.revision], " "):]
}

// read looks at everything: at the newest revision and at ten older ones.
func read(client *clientv3.Client) (*state, error) {
	if *users && client.Username == "" {
		// A server that has just got its users wants one from now on.
		as, err := clientv3.New(clientv3.Config{Endpoints: client.Endpoints(), Username: "root", Password: password})
		if err != nil {
			return nil, err
		}
		defer as.Close()
		client = as
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	s := &state{keys: map[int64]int{}, contents: map[int64]string{}, hashes: map[int64]uint32{}}
	endpoint := client.Endpoints()[0]
	hashed, err := client.HashKV(ctx, endpoint, 0)
	if err != nil {
		return nil, err
	}
	s.revision, s.compacted = hashed.Header.Revision, hashed.CompactRevision
	first := max(s.compacted, 1)
	step := max((s.revision-first)/10, 1)
	for at := s.revision; at >= first; at -= step {
		if s.contents[at], s.keys[at], err = contents(ctx, client, at); err != nil {
			return nil, fmt.Errorf("keys at revision %d: %w", at, err)
		}
		// A server that compacted just there remembers another hash of it for as long as it runs.
		if at > first {
			hashed, err := client.HashKV(ctx, endpoint, at)
			if err != nil {
				return nil, fmt.Errorf("hash of revision %d: %w", at, err)
			}
			s.hashes[at] = hashed.Hash
		}
	}
	if s.compacted > 1 {
		if _, err := client.Get(ctx, "a", clientv3.WithRev(s.compacted-1)); !errors.Is(err, rpctypes.ErrCompacted) {
			return nil, fmt.Errorf("what was compacted is answered with %v", err)
		}
	}
	granted, err := client.Leases(ctx)
	if err != nil {
		return nil, err
	}
	for _, lease := range granted.Leases {
		ttl, err := client.TimeToLive(ctx, lease.ID, clientv3.WithAttachedKeys())
		if err != nil {
			return nil, err
		}
		var attached []string
		for _, key := range ttl.Keys {
			attached = append(attached, string(key))
		}
		sort.Strings(attached)
		s.leases = append(s.leases, fmt.Sprintf("%x %d %q", lease.ID, ttl.GrantedTTL, attached))
	}
	sort.Strings(s.leases)
	if !*users {
		return s, nil
	}
	return s, s.readAuth(ctx, client)
}

func contents(ctx context.Context, client *clientv3.Client, at int64) (string, int, error) {
	sum, count := sha256.New(), 0
	for from := "\x00"; ; {
		answer, err := client.Get(ctx, from, clientv3.WithFromKey(), clientv3.WithLimit(page), clientv3.WithRev(at))
		if err != nil {
			return "", 0, err
		}
		for _, kv := range answer.Kvs {
			add(sum, kv)
			from = string(kv.Key) + "\x00"
		}
		count += len(answer.Kvs)
		if !answer.More {
			return fmt.Sprintf("%d: %d keys, %x", at, count, sum.Sum(nil)), count, nil
		}
	}
}

func add(sum hash.Hash, kv *mvccpb.KeyValue) {
	fmt.Fprintf(sum, "%q %d %d %d %x %q\n", kv.Key, kv.CreateRevision, kv.ModRevision, kv.Version, kv.Lease, kv.Value)
}

func (s *state) readAuth(ctx context.Context, client *clientv3.Client) error {
	status, err := client.AuthStatus(ctx)
	if err != nil {
		return err
	}
	s.auth = append(s.auth, fmt.Sprint("enabled ", status.Enabled, " revision ", status.AuthRevision))
	users, err := client.UserList(ctx)
	if err != nil {
		return err
	}
	for _, name := range users.Users {
		user, err := client.UserGet(ctx, name)
		if err != nil {
			return err
		}
		s.auth = append(s.auth, fmt.Sprintf("user %s %q", name, user.Roles))
	}
	roles, err := client.RoleList(ctx)
	if err != nil {
		return err
	}
	for _, name := range roles.Roles {
		role, err := client.RoleGet(ctx, name)
		if err != nil {
			return err
		}
		for _, perm := range role.Perm {
			s.auth = append(s.auth, fmt.Sprintf("role %s %v %q %q", name, perm.PermType, perm.Key, perm.RangeEnd))
		}
	}
	sort.Strings(s.auth)
	// The passwords still fit, and permissions still hold.
	if _, err := client.Authenticate(ctx, "reader", "wrong"); !errors.Is(err, rpctypes.ErrAuthFailed) {
		return fmt.Errorf("a wrong password is answered with %v", err)
	}
	reader, err := clientv3.New(clientv3.Config{Endpoints: client.Endpoints(), Username: "reader", Password: "read"})
	if err != nil {
		return err
	}
	defer reader.Close()
	if _, err := reader.Get(ctx, "key/001/0000001"); err != nil {
		return fmt.Errorf("the user reader: %w", err)
	}
	if _, err := reader.Get(ctx, "key/002/0000002"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		return fmt.Errorf("what the user reader may not read is answered with %v", err)
	}
	return nil
}

// check sees to it that there is something to compare.
func (s *state) check(keys int) error {
	if s.keys[s.revision] < keys/2 || len(s.contents) < 10 || len(s.leases) != leases-10 || *users && len(s.auth) < 6 || s.compacted < 1 {
		return fmt.Errorf("etcd was not filled: %d keys, %d revisions, %d leases, %q", s.keys[s.revision], len(s.contents), len(s.leases), s.auth)
	}
	fmt.Printf("%d keys at revision %d, compacted to %d; %d leases; %q\n", s.keys[s.revision], s.revision, s.compacted, len(s.leases), s.auth)
	return nil
}

func (s *state) compare(other *state) error {
	for _, part := range []struct {
		what string
		a, b any
	}{
		{"revision", s.revision, other.revision},
		{"compacted revision", s.compacted, other.compacted},
		{"keys", s.contents, other.contents},
		{"hashes", s.hashes, other.hashes},
		{"leases", s.leases, other.leases},
		{"users and roles", s.auth, other.auth},
	} {
		if a, b := fmt.Sprint(part.a), fmt.Sprint(part.b); a != b {
			return fmt.Errorf("%s differ:\n%.2000s\n%.2000s", part.what, a, b)
		}
	}
	return nil
}

// goOn sees to it that a restored store takes writes and compacts.
func goOn(client *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	put, err := client.Put(ctx, "after", "the way")
	if err != nil {
		return err
	}
	_, err = client.Compact(ctx, put.Header.Revision, clientv3.WithCompactPhysical())
	return err
}
