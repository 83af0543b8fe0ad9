// Package netfault is the network between the members: one TCP proxy before each of them, and a rule for each directed
// pair that the proxies follow. Whatever bytes travel from one member to another obey the rule of that direction, whoever
// of the two opened the connection.
package netfault

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

type Mode int

const (
	Pass Mode = iota
	// Hold keeps the bytes and delivers them when the rule changes: a short outage, over which TCP retransmits.
	Hold
	// Discard takes the bytes and delivers nothing; connections that lost bytes are reset when the rule changes.
	Discard
	// Reset breaks the connections and refuses new ones.
	Reset
)

func (m Mode) String() string { return [...]string{"pass", "hold", "discard", "reset"}[m] }

// Rule says what happens to the bytes of one direction.
type Rule struct {
	Mode           Mode
	Delay          time.Duration
	Jitter         time.Duration // each chunk waits up to this much longer, each connection too, in order
	BytesPerSecond int           // 0: no limit
	ResetEvery     time.Duration // each connection is reset at random, on average after this time; 0: never
	OvertakeEvery  time.Duration // likewise, but what was under way arrives late, after what later connections carry
}

type link struct {
	mu      sync.Mutex
	rule    Rule
	changed chan struct{}
}

func (l *link) get() (Rule, chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rule, l.changed
}

func (l *link) set(r Rule) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rule = r
	close(l.changed)
	l.changed = make(chan struct{})
}

type Target struct {
	Listen string // where the proxy listens: the member's advertised address
	Dial   string // where the member listens
}

type Network struct {
	targets   []Target
	listeners []net.Listener
	links     [][]*link // [from][to]
	pids      func() map[int]int
	done      chan struct{}
	wait      sync.WaitGroup

	mu    sync.Mutex
	pipes map[*pipe]bool

	// Strangers counts connections that no member owned, most of them closed before one could look.
	Strangers atomic.Int64
	// Opened counts connections between members.
	Opened atomic.Int64
	// Done counts what the rules did.
	Done Effects
}

// Effects counts what was done to the traffic, so that a fault that did nothing is noticed.
type Effects struct {
	HeldBytes      atomic.Int64 // held back until the rule changed
	DiscardedBytes atomic.Int64
	DelayedBytes   atomic.Int64
	SlowedBytes    atomic.Int64 // sent over a link with few bytes a second
	Resets         atomic.Int64 // of connections, by Reset and ResetEvery
	Overtaken      atomic.Int64 // connections that later ones may overtake
	LateBytes      atomic.Int64 // delivered from such a connection after its sender had lost it
}

func (e *Effects) String() string {
	return fmt.Sprintf("bytes held %d, discarded %d, delayed %d, slowed %d, late %d; connections reset %d, overtaken %d", e.HeldBytes.Load(),
		e.DiscardedBytes.Load(), e.DelayedBytes.Load(), e.SlowedBytes.Load(), e.LateBytes.Load(), e.Resets.Load(), e.Overtaken.Load())
}

// New listens for all targets. pids gives the members' processes: process id to index.
func New(targets []Target, pids func() map[int]int) (*Network, error) {
	n := &Network{targets: targets, pids: pids, done: make(chan struct{}), pipes: map[*pipe]bool{}}
	for range targets {
		var row []*link
		for range targets {
			row = append(row, &link{changed: make(chan struct{})})
		}
		n.links = append(n.links, row)
	}
	for i, t := range targets {
		l, err := net.Listen("tcp", t.Listen)
		if err != nil {
			n.Close()
			return nil, err
		}
		n.listeners = append(n.listeners, l)
		n.wait.Add(1)
		go func() {
			defer n.wait.Done()
			n.accept(i, l)
		}()
	}
	n.wait.Add(1)
	go func() {
		defer n.wait.Done()
		n.breakAtRandom()
	}()
	return n, nil
}

// Set gives the direction from one member to another its rule.
func (n *Network) Set(from, to int, r Rule) {
	old, _ := n.links[from][to].get()
	n.links[from][to].set(r)
	if r.Mode == Reset || old.Mode == Discard {
		for _, p := range n.between(from, to) {
			if r.Mode == Reset || p.lost.Load() {
				n.Done.Resets.Add(1)
				p.reset()
			}
		}
	}
}

// Both sets both directions of a pair.
func (n *Network) Both(a, b int, r Rule) {
	n.Set(a, b, r)
	n.Set(b, a, r)
}

// Heal lets everything pass.
func (n *Network) Heal() {
	for i := range n.links {
		for j := range n.links {
			if i != j {
				n.Set(i, j, Rule{})
			}
		}
	}
}

// Close ends the proxies and their connections.
func (n *Network) Close() {
	n.mu.Lock()
	select {
	case <-n.done:
		n.mu.Unlock()
		return
	default:
	}
	close(n.done)
	n.mu.Unlock()
	for _, l := range n.listeners {
		l.Close()
	}
	for _, p := range n.all() {
		p.reset()
	}
	n.wait.Wait()
}

func (n *Network) all() []*pipe {
	n.mu.Lock()
	defer n.mu.Unlock()
	var pipes []*pipe
	for p := range n.pipes {
		pipes = append(pipes, p)
	}
	return pipes
}

// between gives the connections that carry bytes from one member to another.
func (n *Network) between(from, to int) []*pipe {
	var pipes []*pipe
	for _, p := range n.all() {
		if p.from == from && p.to == to || p.from == to && p.to == from {
			pipes = append(pipes, p)
		}
	}
	return pipes
}

func (n *Network) accept(to int, l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			select {
			case <-n.done:
				return
			case <-time.After(10 * time.Millisecond):
				continue
			}
		}
		n.wait.Add(1)
		go func() {
			defer n.wait.Done()
			n.serve(conn.(*net.TCPConn), to)
		}()
	}
}

func (n *Network) serve(conn *net.TCPConn, to int) {
	from, err := identify(conn, n.pids)
	if err != nil {
		n.Strangers.Add(1)
		hardClose(conn)
		return
	}
	n.Opened.Add(1)
	p := &pipe{net: n, from: from, to: to, opener: conn, closed: make(chan struct{})}
	n.mu.Lock()
	n.pipes[p] = true
	n.mu.Unlock()
	defer func() {
		p.reset()
		n.mu.Lock()
		delete(n.pipes, p)
		n.mu.Unlock()
	}()
	p.run()
}

// breakAtRandom carries out ResetEvery and OvertakeEvery.
func (n *Network) breakAtRandom() {
	const step = 20 * time.Millisecond
	tick := time.NewTicker(step)
	defer tick.Stop()
	happens := func(every time.Duration) bool {
		return every > 0 && rand.Float64() < float64(step)/float64(every)
	}
	for {
		select {
		case <-n.done:
			return
		case <-tick.C:
		}
		for _, p := range n.all() {
			there, _ := n.links[p.from][p.to].get()
			back, _ := n.links[p.to][p.from].get()
			switch {
			case happens(there.ResetEvery), happens(back.ResetEvery):
				n.Done.Resets.Add(1)
				p.reset()
			case happens(there.OvertakeEvery):
				p.overtake(true)
			case happens(back.OvertakeEvery):
				p.overtake(false)
			}
		}
	}
}

func hardClose(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}

func (n *Network) String() string {
	text := ""
	for i := range n.links {
		for j := range n.links {
			if r, _ := n.links[i][j].get(); r != (Rule{}) {
				text += fmt.Sprintf("%d->%d %+v; ", i, j, r)
			}
		}
	}
	return text
}
