package netfault

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"testing"
	"time"
)

// patience is how long a busy machine may take for what comes at once otherwise.
const patience = 30 * time.Second

// The test process plays every member: whoever connects is member 0, and talks to member 1.
func pair(t *testing.T) (*Network, func() (net.Conn, net.Conn)) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inner.Close() })
	n, err := New([]Target{{"127.0.0.1:0", "127.0.0.1:1"}, {"127.0.0.1:0", inner.Addr().String()}},
		func() map[int]int { return map[int]int{os.Getpid(): 0} })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n, func() (net.Conn, net.Conn) {
		t.Helper()
		a, err := net.Dial("tcp", n.listeners[1].Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Close() })
		b, err := inner.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		return a, b
	}
}

// arrives tells whether a line gets from one end to the other within a time.
func arrives(t *testing.T, from, to net.Conn, text string, limit time.Duration) bool {
	t.Helper()
	fmt.Fprintln(from, text)
	return comes(to, text, limit)
}

func comes(to net.Conn, text string, limit time.Duration) bool {
	_ = to.SetReadDeadline(time.Now().Add(limit))
	line, err := bufio.NewReader(to).ReadString('\n')
	return err == nil && line == text+"\n"
}

func TestPass(t *testing.T) {
	_, open := pair(t)
	a, b := open()
	if !arrives(t, a, b, "there", patience) || !arrives(t, b, a, "back", patience) {
		t.Fatal("a healthy network does not carry")
	}
}

func TestOneWayHold(t *testing.T) {
	n, open := pair(t)
	a, b := open()
	n.Set(0, 1, Rule{Mode: Hold})
	if arrives(t, a, b, "late", 100*time.Millisecond) {
		t.Fatal("the cut direction carries")
	}
	if !arrives(t, b, a, "back", patience) {
		t.Fatal("the other direction does not carry")
	}
	n.Heal()
	if !comes(b, "late", patience) {
		t.Fatal("what was held did not come")
	}
}

func TestDiscardBreaksTheConnectionWhenHealed(t *testing.T) {
	n, open := pair(t)
	a, b := open()
	n.Set(1, 0, Rule{Mode: Discard})
	if arrives(t, b, a, "lost", 100*time.Millisecond) {
		t.Fatal("the cut direction carries")
	}
	if !arrives(t, a, b, "there", patience) {
		t.Fatal("the other direction does not carry")
	}
	n.Heal()
	_ = a.SetReadDeadline(time.Now().Add(patience))
	if _, err := a.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Fatalf("a connection that lost bytes lives on: %v", err)
	}
	a, b = open()
	if !arrives(t, b, a, "again", patience) {
		t.Fatal("a new connection does not carry")
	}
}

func TestDelayAndSlowLink(t *testing.T) {
	n, open := pair(t)
	a, b := open()
	n.Set(0, 1, Rule{Delay: 150 * time.Millisecond})
	began := time.Now()
	if !arrives(t, a, b, "slow", patience) || time.Since(began) < 150*time.Millisecond {
		t.Fatal("no delay")
	}
	n.Set(0, 1, Rule{BytesPerSecond: 100})
	began = time.Now()
	if !arrives(t, a, b, "0123456789012345678", patience) || time.Since(began) < 190*time.Millisecond {
		t.Fatal("not slow")
	}
}

func TestResetAndOvertake(t *testing.T) {
	n, open := pair(t)
	a, b := open()
	n.Set(0, 1, Rule{Delay: 50 * time.Millisecond})
	fmt.Fprintln(a, "old")
	for began := time.Now(); n.Done.DelayedBytes.Load() < 4; time.Sleep(time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatal("nothing is under way")
		}
	}
	for _, p := range n.all() {
		p.overtake(true)
	}
	_ = a.SetReadDeadline(time.Now().Add(patience))
	if _, err := a.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Fatal("the sender did not notice")
	}
	c, d := open()
	if !arrives(t, c, d, "new", patience) {
		t.Fatal("the new connection does not carry")
	}
	if !comes(b, "old", patience) {
		t.Fatal("what was under way did not come")
	}
	n.Set(0, 1, Rule{Mode: Reset})
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Fatal("not reset")
	}
}
