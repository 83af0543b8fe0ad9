package check

import (
	"time"

	"metastore/robustness/internal/history"
)

// checkLeases: a key lives as long as its lease was promised to live, and a lease that nobody keeps alive goes.
//
// A keep-alive that succeeded was received after it was sent, so it promises at least send time + TTL. When exactly a key was
// deleted nobody knows, but it was before the deletion was first seen: seen earlier than promised is too early for certain.
func checkLeases(h *history.History, log *eventLog, cfg Config, out *reporter) {
	for _, l := range h.Leases {
		ttl := l.TTL * int64(time.Second)
		for _, key := range l.Keys {
			changes := log.keys[key]
			for _, e := range changes {
				if !e.event.Deleted || l.RevokeCall > 0 && l.RevokeCall <= e.seen {
					continue
				}
				promised := int64(0)
				if l.GrantOutcome == history.OK {
					promised = l.GrantCall + ttl
				}
				sent := int64(0)
				for _, k := range l.KeepAlives {
					if k.Outcome == history.OK && k.Send < e.seen && k.Send+k.TTL*int64(time.Second) > promised {
						promised, sent = k.Send+k.TTL*int64(time.Second), k.Send
					}
				}
				if e.seen < promised {
					out.add("lease %x (TTL %ds) was kept alive at %s, so until %s, but %s was deleted at revision %d, seen at %s",
						l.ID, l.TTL, history.Seconds(sent), history.Seconds(promised), key, e.rev, history.Seconds(e.seen))
				}
			}
			if len(changes) == 0 || changes[len(changes)-1].event.Deleted || l.TTL == 0 || h.EndedAt == 0 {
				continue
			}
			deadline := max(l.LastAttempt(), h.HealthyAt) + ttl + int64(cfg.LeaseLate)
			if l.RevokeCall == 0 && !l.Kept && deadline < h.EndedAt {
				out.add("lease %x (TTL %ds) was last kept alive at %s, the cluster healthy since %s, and %s still there at %s",
					l.ID, l.TTL, history.Seconds(l.LastAttempt()), history.Seconds(h.HealthyAt), key, history.Seconds(h.EndedAt))
			}
		}
	}
}
