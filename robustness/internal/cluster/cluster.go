// Package cluster starts and controls the members: real processes on loopback, whose peers reach each other only through
// the proxies of package netfault.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"metastore/robustness/internal/netfault"
)

type Config struct {
	Bin           string
	Args          []string // given to every member after our own
	Members       int
	Dir           string
	Heartbeat     time.Duration
	Election      time.Duration
	SnapshotCount int
	CatchUp       int
	Progress      time.Duration // --watch-progress-notify-interval; 0 leaves the flag out
	Direct        bool          // no proxies between the peers
	Log           func(format string, args ...any)
}

// Member is one place in the cluster: it keeps its name, its ports and its log over restarts and replacements.
type Member struct {
	Name      string
	Index     int
	ClientURL string
	PeerURL   string // advertised: the proxy's, unless the cluster is direct
	LogPath   string

	listenPeer string
	faultFile  string
	cluster    *Cluster

	mu      sync.Mutex
	dir     string
	dirs    int
	process *process
	life    int
	state   string // of --initial-cluster-state
	initial string // of --initial-cluster
}

type Cluster struct {
	Config
	Members []*Member
	Net     *netfault.Network

	token   string
	admins  []*clientv3.Client
	mu      sync.Mutex
	seen    []string // unexpected deaths
	closing bool
}

// New prepares a cluster without starting it.
func New(cfg Config) (*Cluster, error) {
	c := &Cluster{Config: cfg, token: fmt.Sprintf("robustness-%d", os.Getpid())}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	taken := map[int]bool{}
	var proxies []netfault.Target
	for i := range cfg.Members {
		var ports [3]int
		for j := range ports {
			port, err := freePort(taken)
			if err != nil {
				return nil, err
			}
			ports[j] = port
		}
		name := fmt.Sprintf("m%d", i+1)
		m := &Member{
			Name: name, Index: i, cluster: c,
			ClientURL:  fmt.Sprintf("http://127.0.0.1:%d", ports[0]),
			listenPeer: fmt.Sprintf("http://127.0.0.1:%d", ports[1]),
			PeerURL:    fmt.Sprintf("http://127.0.0.1:%d", ports[2]),
			LogPath:    filepath.Join(cfg.Dir, name+".log"),
			faultFile:  filepath.Join(cfg.Dir, name+".fault"),
			dir:        filepath.Join(cfg.Dir, name+".data"),
			state:      "new",
		}
		if cfg.Direct {
			m.PeerURL = m.listenPeer
		}
		proxies = append(proxies, netfault.Target{
			Listen: strings.TrimPrefix(m.PeerURL, "http://"), Dial: strings.TrimPrefix(m.listenPeer, "http://")})
		c.Members = append(c.Members, m)
	}
	for _, m := range c.Members {
		m.initial = c.initialCluster(c.Members)
	}
	if !cfg.Direct {
		net, err := netfault.New(proxies, c.pids)
		if err != nil {
			return nil, err
		}
		c.Net = net
	}
	for _, m := range c.Members {
		admin, err := c.NewClient(m)
		if err != nil {
			c.Close()
			return nil, err
		}
		c.admins = append(c.admins, admin)
	}
	return c, nil
}

func (c *Cluster) initialCluster(members []*Member) string {
	var parts []string
	for _, m := range members {
		parts = append(parts, m.Name+"="+m.PeerURL)
	}
	return strings.Join(parts, ",")
}

// pids tells the proxies which process is which member.
func (c *Cluster) pids() map[int]int {
	pids := map[int]int{}
	for _, m := range c.Members {
		if p := m.current(); p != nil && p.alive() {
			pids[p.pid] = m.Index
		}
	}
	return pids
}

// NewClient gives a client that knows one member only and never sends a request twice: with one attempt per call, an
// unknown outcome stays visible.
func (c *Cluster) NewClient(m *Member) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:            []string{m.ClientURL},
		DialTimeout:          2 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		MaxUnaryRetries:      1,
		Logger:               zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.3, Jitter: 0.2, MaxDelay: 300 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}),
			grpc.WithChainUnaryInterceptor(failFast)},
	})
}

// failFast makes a call fail at once if there is no connection, where the library would have it wait for one: it was
// certainly not sent then.
func failFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoker(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(false))...)
}

// Admin is the harness's own client of a member.
func (c *Cluster) Admin(m *Member) *clientv3.Client { return c.admins[m.Index] }

// Start starts all members.
func (c *Cluster) Start() error {
	for _, m := range c.Members {
		if err := m.Start(); err != nil {
			return err
		}
	}
	return nil
}

// Close kills every process and closes every proxy. It may be called more than once.
func (c *Cluster) Close() {
	c.mu.Lock()
	c.closing = true
	c.mu.Unlock()
	for _, m := range c.Members {
		if err := m.Kill(); err != nil {
			c.Log("%s: %v", m.Name, err)
		}
	}
	for _, a := range c.admins {
		a.Close()
	}
	if c.Net != nil {
		c.Net.Close()
	}
}

// RemoveData deletes the data directories of all members from a run's directory.
func RemoveData(dir string) {
	dirs, _ := filepath.Glob(filepath.Join(dir, "m*.data*"))
	for _, d := range dirs {
		os.RemoveAll(d)
	}
}

// UnexpectedDeaths tells of processes that ended though nobody asked them to.
func (c *Cluster) UnexpectedDeaths() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.seen...)
}

func (m *Member) current() *process {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.process
}

// Life is the number of the member's current process.
func (m *Member) Life() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.life
}

// Pid is 0 if the member does not run.
func (m *Member) Pid() int {
	if p := m.current(); p != nil && p.alive() {
		return p.pid
	}
	return 0
}

// Running tells whether the member's process exists and is not stopped.
func (m *Member) Running() bool {
	p := m.current()
	if p == nil || !p.alive() {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.paused
}

// Start starts the member's process on its data directory.
func (m *Member) Start() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.process != nil && m.process.alive() {
		return fmt.Errorf("%s runs already", m.Name)
	}
	c := m.cluster
	args := []string{
		"--name", m.Name,
		"--data-dir", m.dir,
		"--listen-client-urls", m.ClientURL,
		"--advertise-client-urls", m.ClientURL,
		"--listen-peer-urls", m.listenPeer,
		"--initial-advertise-peer-urls", m.PeerURL,
		"--initial-cluster", m.initial,
		"--initial-cluster-token", c.token,
		"--initial-cluster-state", m.state,
		"--heartbeat-interval", strconv.FormatInt(c.Heartbeat.Milliseconds(), 10),
		"--election-timeout", strconv.FormatInt(c.Election.Milliseconds(), 10),
		"--snapshot-count", strconv.Itoa(c.SnapshotCount),
		"--snapshot-catchup-entries", strconv.Itoa(c.CatchUp),
	}
	if c.Progress > 0 {
		args = append(args, "--watch-progress-notify-interval", c.Progress.String())
	}
	args = append(args, c.Args...)
	p, err := startProcess(c.Bin, args, []string{"METASTORE_FAULT_FILE=" + m.faultFile}, m.LogPath)
	if err != nil {
		return fmt.Errorf("%s: %w", m.Name, err)
	}
	m.process = p
	m.life++
	life := m.life
	go func() {
		<-p.done
		if p.endExpected() {
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.closing {
			return
		}
		c.seen = append(c.seen, fmt.Sprintf("%s (life %d, pid %d) ended by itself: %v; its log: %s",
			m.Name, life, p.pid, p.state, m.LogPath))
	}()
	return nil
}

// Kill ends the member at once, as a crash does.
func (m *Member) Kill() error {
	p := m.current()
	if p == nil {
		return nil
	}
	return p.kill()
}

// Terminate asks the member to stop and waits for it; it says how long that took.
func (m *Member) Terminate(limit time.Duration) (time.Duration, error) {
	p := m.current()
	if p == nil || !p.alive() {
		return 0, nil
	}
	began := time.Now()
	p.expectEnd()
	if err := p.signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return 0, err
	}
	err := p.wait(limit)
	if err != nil {
		_ = p.kill()
	}
	return time.Since(began), err
}

// Pause stops the process without its knowing.
func (m *Member) Pause() error { return m.pause(syscall.SIGSTOP, true) }

// Resume lets a paused process go on.
func (m *Member) Resume() error { return m.pause(syscall.SIGCONT, false) }

func (m *Member) pause(s syscall.Signal, paused bool) error {
	p := m.current()
	if p == nil || !p.alive() {
		return nil
	}
	p.mu.Lock()
	p.paused = paused
	p.mu.Unlock()
	if err := p.signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// SlowDisk asks the member's log writer, through its fault hook, to delay each sync; 0 takes the fault back. A binary
// without the hook goes on as before.
func (m *Member) SlowDisk(delay time.Duration) error {
	text := ""
	if delay > 0 {
		text = fmt.Sprintf("log-sync-delay-ms %d\n", delay.Milliseconds())
	}
	return m.fault(text)
}

// CorruptPuts asks the member, through its fault hook, to apply its next puts with another value than its peers.
func (m *Member) CorruptPuts(count int) error {
	return m.fault(fmt.Sprintf("corrupt-puts %d\n", count))
}

func (m *Member) fault(text string) error {
	// Renamed into place, so that no reader sees half of it.
	if err := os.WriteFile(m.faultFile+".new", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(m.faultFile+".new", m.faultFile)
}

// HealAll ends every fault: connections flow, paused processes run, dead ones are started.
func (c *Cluster) HealAll() error {
	var errs []error
	if c.Net != nil {
		c.Net.Heal()
	}
	for _, m := range c.Members {
		errs = append(errs, m.SlowDisk(0), m.Resume())
		if p := m.current(); p != nil && !p.alive() && p.endExpected() {
			errs = append(errs, m.Start())
		}
	}
	return errors.Join(errs...)
}

// Leader finds the member that most running members call leader.
func (c *Cluster) Leader(ctx context.Context) (*Member, error) {
	for {
		if m := c.leaderNow(ctx); m != nil {
			return m, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no leader: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

type statusReply struct {
	member *Member
	reply  *clientv3.StatusResponse
}

// Statuses asks every running member.
func (c *Cluster) Statuses(ctx context.Context, limit time.Duration) []*clientv3.StatusResponse {
	replies := make([]*clientv3.StatusResponse, len(c.Members))
	got := make(chan statusReply, len(c.Members))
	asked := 0
	for _, m := range c.Members {
		if !m.Running() {
			continue
		}
		asked++
		go func() {
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			reply, err := c.Admin(m).Status(ctx, m.ClientURL)
			if err != nil {
				reply = nil
			}
			got <- statusReply{m, reply}
		}()
	}
	for range asked {
		r := <-got
		replies[r.member.Index] = r.reply
	}
	return replies
}

func (c *Cluster) leaderNow(ctx context.Context) *Member {
	statuses := c.Statuses(ctx, 500*time.Millisecond)
	// The leader is who calls itself so in the highest term.
	var leader *Member
	var term uint64
	for i, s := range statuses {
		if s != nil && s.Leader != 0 && s.Leader == s.Header.MemberId && s.RaftTerm > term {
			leader, term = c.Members[i], s.RaftTerm
		}
	}
	for _, s := range statuses {
		if s != nil && s.RaftTerm > term {
			return nil // an election is on, or was won by somebody who did not answer
		}
	}
	return leader
}

// WaitHealthy waits until every member answers a linearizable read and a write succeeds through it.
func (c *Cluster) WaitHealthy(ctx context.Context) error {
	for _, m := range c.Members {
		for {
			call, cancel := context.WithTimeout(ctx, time.Second)
			_, err := c.Admin(m).Get(call, "health")
			cancel()
			if err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s does not answer a linearizable read: %w (last: %v)", m.Name, ctx.Err(), err)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	return nil
}

// others gives the members but one, the running ones first.
func (c *Cluster) others(m *Member) []*Member {
	var rest []*Member
	for _, o := range c.Members {
		if o != m {
			rest = append(rest, o)
		}
	}
	sort.SliceStable(rest, func(i, j int) bool { return rest[i].Running() && !rest[j].Running() })
	return rest
}

// Remove takes a member out of the cluster while it runs, and then its process and data away. It says whether the process
// stopped by itself.
func (c *Cluster) Remove(ctx context.Context, m *Member, wait time.Duration) (bool, error) {
	via := c.others(m)[0]
	p := m.current()
	if p != nil {
		p.expectEnd()
	}
	if err := c.retry(ctx, "remove "+m.Name, func(ctx context.Context) error {
		list, err := c.Admin(via).MemberList(ctx)
		if err != nil {
			return err
		}
		for _, l := range list.Members {
			if len(l.PeerURLs) == 1 && l.PeerURLs[0] == m.PeerURL {
				_, err := c.Admin(via).MemberRemove(ctx, l.ID)
				return err
			}
		}
		return nil // an earlier attempt did it
	}); err != nil {
		return false, err
	}
	byItself := false
	if p != nil {
		byItself = p.wait(wait) == nil
		if err := p.kill(); err != nil {
			return byItself, err
		}
	}
	m.mu.Lock()
	old := m.dir
	m.dirs++
	m.dir = filepath.Join(c.Dir, fmt.Sprintf("%s.data%d", m.Name, m.dirs))
	m.mu.Unlock()
	return byItself, os.RemoveAll(old)
}

// Add puts a removed member back in with an empty directory.
func (c *Cluster) Add(ctx context.Context, m *Member) error {
	via := c.others(m)[0]
	if err := c.retry(ctx, "add "+m.Name, func(ctx context.Context) error {
		list, err := c.Admin(via).MemberList(ctx)
		if err != nil {
			return err
		}
		for _, l := range list.Members {
			if len(l.PeerURLs) == 1 && l.PeerURLs[0] == m.PeerURL {
				return nil // an earlier attempt did it
			}
		}
		_, err = c.Admin(via).MemberAdd(ctx, []string{m.PeerURL})
		return err
	}); err != nil {
		return err
	}
	m.mu.Lock()
	m.state = "existing"
	m.mu.Unlock()
	return m.Start()
}

// retry repeats an idempotent request until it succeeds: members that have just come may not count as healthy yet.
func (c *Cluster) retry(ctx context.Context, what string, f func(context.Context) error) error {
	for {
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := f(call)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w (last: %v)", what, ctx.Err(), err)
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// Rss gives the resident memory of the member's process now and at its peak, in bytes.
func (m *Member) Rss() (now, peak int64) {
	pid := m.Pid()
	if pid == 0 {
		return 0, 0
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			now = n << 10
		case "VmHWM:":
			peak = n << 10
		}
	}
	return now, peak
}

// ResetPeakRss makes the peak start anew, where the kernel allows it.
func (m *Member) ResetPeakRss() error {
	pid := m.Pid()
	if pid == 0 {
		return os.ErrProcessDone
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}
