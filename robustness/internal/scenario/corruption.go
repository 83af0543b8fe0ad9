package scenario

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"metastore/robustness/internal/cluster"
)

// How long members may take to find out that the state of one of them differs.
const corruptionFound = 15 * time.Second

// Corruption makes one member apply a put with a wrong value, a follower first and then a leader. The others must find it
// out and shut it off: it answers no read and takes no write, not even once it was restarted, its watches end, and another
// member leads. The cluster goes on, also while a healthy member restarts, and is whole again when the odd one is replaced.
func Corruption(ctx context.Context, cfg Config) (*Outcome, error) {
	r, err := start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer r.c.Close()
	for _, who := range []string{"follower", "leader"} {
		if err := r.corrupt(ctx, who); err != nil {
			r.violation("corruption", "%s: %v", who, err)
			break
		}
	}
	for _, d := range r.c.UnexpectedDeaths() {
		r.violation("process", "%s", d)
	}
	if len(r.outcome.Violations) == 0 {
		r.compareHashes(ctx, r.c.Members[0])
	}
	return &r.outcome, nil
}

func (r *run) corrupt(ctx context.Context, who string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	odd, err := r.c.Leader(ctx)
	if err != nil {
		return err
	}
	if who == "follower" {
		odd = r.c.Members[(odd.Index+1)%len(r.c.Members)]
	}
	var rest []*cluster.Member
	for _, m := range r.c.Members {
		if m != odd {
			rest = append(rest, m)
		}
	}
	watch := r.c.Admin(odd).Watch(clientv3.WithRequireLeader(ctx), "w", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-watch; created.Err() != nil {
		return fmt.Errorf("watching through %s: %w", odd.Name, created.Err())
	}
	r.log("%s, a %s, applies a put with a wrong value", odd.Name, who)
	if err := odd.CorruptPuts(1); err != nil {
		return err
	}
	time.Sleep(200 * time.Millisecond) // the file is read now and then
	began := time.Now()
	if err := r.putUntil(ctx, rest, "wrong here or there"); err != nil {
		return err
	}
	took, err := r.shutOff(ctx, odd, began, false)
	if err != nil {
		return err
	}
	if err := odd.CorruptPuts(0); err != nil {
		return err
	}
	ended := time.After(corruptionFound)
	for open := true; open; {
		select {
		case reply, more := <-watch:
			open = more && reply.Err() == nil
		case <-ended:
			return fmt.Errorf("a watch through %s, which is shut off, does not end", odd.Name)
		}
	}
	if leader, err := r.c.Leader(ctx); err != nil {
		return err
	} else if leader == odd {
		return fmt.Errorf("%s leads although it is shut off", odd.Name)
	}
	alarms, err := r.c.Admin(rest[0]).AlarmList(ctx)
	if err != nil {
		return err
	}
	if len(alarms.Alarms) != 1 || alarms.Alarms[0].Alarm != pb.AlarmType_CORRUPT {
		return fmt.Errorf("alarms %v, not the one of %s", alarms.Alarms, odd.Name)
	}

	// With one that is shut off and one that is away the rest is a majority by itself no more, but no reason to doubt.
	if _, err := rest[1].Terminate(10 * time.Second); err != nil {
		return err
	}
	time.Sleep(5 * time.Second)
	if err := rest[1].Start(); err != nil {
		return err
	}
	if err := r.putUntil(ctx, rest, "after "+who); err != nil {
		return err
	}
	// A restart does not make it trustworthy.
	if err := odd.Kill(); err != nil {
		return err
	}
	if err := odd.Start(); err != nil {
		return err
	}
	if _, err := r.shutOff(ctx, odd, time.Now(), true); err != nil {
		return fmt.Errorf("after a restart: %w", err)
	}

	if _, err := r.c.Remove(ctx, odd, 5*time.Second); err != nil {
		return err
	}
	if err := r.c.Add(ctx, odd); err != nil {
		return err
	}
	if _, err := r.recovered(ctx); err != nil {
		return err
	}
	alarms, err = r.c.Admin(odd).AlarmList(ctx)
	if err != nil {
		return err
	}
	if len(alarms.Alarms) != 0 {
		return fmt.Errorf("alarms %v after %s was replaced", alarms.Alarms, odd.Name)
	}
	r.line("%s, a %s, was shut off %.3fs after it applied a wrong value, and replaced", odd.Name, who, took.Seconds())
	return nil
}

// shutOff waits until a member answers neither reads nor writes, and then sees that it does not change its mind. It must
// never show a value once it has refused one, or at all if it is known to be shut off.
func (r *run) shutOff(ctx context.Context, odd *cluster.Member, began time.Time, known bool) (time.Duration, error) {
	var took time.Duration
	for refused := 0; refused < 20; {
		if took == 0 && time.Since(began) > corruptionFound {
			return 0, fmt.Errorf("%s is not shut off after %v", odd.Name, corruptionFound)
		}
		call, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := r.c.Admin(odd).Get(call, "stale", clientv3.WithSerializable())
		cancel()
		switch {
		case errors.Is(err, rpctypes.ErrCorrupt):
			if took == 0 {
				took = time.Since(began)
			}
			refused++
		case (known || refused > 0) && err == nil:
			return 0, fmt.Errorf("%s serves a read after it was shut off", odd.Name)
		}
		time.Sleep(50 * time.Millisecond)
	}
	call, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := r.c.Admin(odd).Put(call, "stale", "through the odd one"); err == nil {
		return 0, fmt.Errorf("%s takes a write although it is shut off", odd.Name)
	}
	return took, nil
}
