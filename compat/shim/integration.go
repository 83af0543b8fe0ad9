// Package integration has the part of etcd's test framework of that name that the tests of etcd's client library use,
// over servers that are processes of their own: those of the binary that METASTORE_COMPAT_BINARY names. suite.py puts it
// in the place of the original, which links etcd's server, and leaves the tests as they are.
package integration

import (
	"context"
	"fmt"
	"math/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"go.etcd.io/etcd/client/pkg/v3/testutil"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// RequestWaitTimeout is how long tests wait for what should not happen.
	RequestWaitTimeout = 5 * time.Second
	readyTimeout       = 30 * time.Second
	stopTimeout        = 10 * time.Second
)

// ClusterConfig says what a cluster is to be like.
type ClusterConfig struct {
	Size                        int
	WatchProgressNotifyInterval time.Duration
	DisableStrictReconfigCheck  bool
	MaxTxnOps                   uint
	MaxRequestBytes             uint
	SnapshotCount               uint64
	UseBridge                   bool
	AuthToken                   string
	QuotaBackendBytes           int64
	GRPCKeepAliveMinTime        time.Duration
}

// Cluster is a cluster of processes.
type Cluster struct {
	Members []*Member
	dir     string
}

// Member is one process, with a client of it.
type Member struct {
	Name   string
	Client *clientv3.Client

	clientURL string
	args      []string
	log       string
	cmd       *exec.Cmd
	exited    chan struct{}
}

// BeforeTest prepares a test.
func BeforeTest(t testutil.TB) {
	t.Helper()
	testutil.RegisterLeakDetection(t)
}

// BeforeTestExternal prepares a test or an example.
func BeforeTestExternal(testutil.TB) {}

// NewClient connects.
func NewClient(tb testing.TB, cfg clientv3.Config) (*clientv3.Client, error) {
	if cfg.Logger == nil {
		cfg.Logger = zaptest.NewLogger(tb).Named("client")
	}
	return clientv3.New(cfg)
}

// freePorts are free when it returns; nothing else in the test's network takes ports.
func freePorts(count int) ([]int, error) {
	var ports []int
	for range count {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer listener.Close()
		ports = append(ports, listener.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// NewCluster starts a cluster and waits until it serves. t may be nil in benchmarks and for shared clusters.
func NewCluster(t testutil.TB, cfg *ClusterConfig) *Cluster {
	cluster, err := start(cfg)
	if err != nil {
		cluster.Terminate(nil)
		if t == nil {
			panic(err)
		}
		t.Fatal(err)
	}
	return cluster
}

func start(cfg *ClusterConfig) (*Cluster, error) {
	cluster := &Cluster{}
	binary := os.Getenv("METASTORE_COMPAT_BINARY")
	if binary == "" {
		return cluster, fmt.Errorf("METASTORE_COMPAT_BINARY names no server")
	}
	if cfg.UseBridge {
		return cluster, fmt.Errorf("there are no bridges here")
	}
	var err error
	if cluster.dir, err = os.MkdirTemp("", "cluster-"); err != nil {
		return cluster, err
	}
	ports, err := freePorts(2 * cfg.Size)
	if err != nil {
		return cluster, err
	}
	var initial []string
	for i := range cfg.Size {
		initial = append(initial, fmt.Sprintf("m%d=http://127.0.0.1:%d", i, ports[2*i+1]))
	}
	for i := range cfg.Size {
		name := fmt.Sprintf("m%d", i)
		clientURL := fmt.Sprintf("http://127.0.0.1:%d", ports[2*i])
		peerURL := fmt.Sprintf("http://127.0.0.1:%d", ports[2*i+1])
		args := []string{
			"--name", name, "--data-dir", filepath.Join(cluster.dir, name),
			"--listen-client-urls", clientURL, "--advertise-client-urls", clientURL,
			"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL,
			"--initial-cluster", strings.Join(initial, ","), "--initial-cluster-token", filepath.Base(cluster.dir),
			// Those of etcd's framework.
			"--heartbeat-interval", "10", "--election-timeout", "100", "--log-level", "warn",
		}
		set := func(name string, isSet bool, value any) {
			if isSet {
				args = append(args, fmt.Sprintf("--%s=%v", name, value))
			}
		}
		set("watch-progress-notify-interval", cfg.WatchProgressNotifyInterval > 0, cfg.WatchProgressNotifyInterval)
		set("strict-reconfig-check", cfg.DisableStrictReconfigCheck, false)
		set("max-txn-ops", cfg.MaxTxnOps > 0, cfg.MaxTxnOps)
		set("max-request-bytes", cfg.MaxRequestBytes > 0, cfg.MaxRequestBytes)
		set("snapshot-count", cfg.SnapshotCount > 0, cfg.SnapshotCount)
		set("auth-token", cfg.AuthToken != "", cfg.AuthToken)
		set("quota-backend-bytes", cfg.QuotaBackendBytes != 0, cfg.QuotaBackendBytes)
		set("grpc-keepalive-min-time", cfg.GRPCKeepAliveMinTime > 0, cfg.GRPCKeepAliveMinTime)
		member := &Member{
			Name: name, clientURL: clientURL, args: append([]string{binary}, args...),
			log: filepath.Join(cluster.dir, name+".log"),
		}
		cluster.Members = append(cluster.Members, member)
		if err := member.start(); err != nil {
			return cluster, err
		}
	}
	for _, member := range cluster.Members {
		if err := member.connect(); err != nil {
			return cluster, err
		}
	}
	return cluster, nil
}

func (m *Member) start() error {
	log, err := os.OpenFile(m.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	m.cmd = exec.Command(m.args[0], m.args[1:]...)
	m.cmd.Stdout, m.cmd.Stderr = log, log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		return err
	}
	m.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait()
		close(exited)
	}(m.cmd, m.exited)
	return nil
}

// connect waits until the member answers.
func (m *Member) connect() error {
	if m.Client == nil {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{m.clientURL}, DialTimeout: 5 * time.Second})
		if err != nil {
			return err
		}
		m.Client = client
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	for {
		attempt, cancelAttempt := context.WithTimeout(ctx, time.Second)
		_, err := m.Client.Get(attempt, "health")
		cancelAttempt()
		if err == nil {
			return nil
		}
		select {
		case <-m.exited:
			text, _ := os.ReadFile(m.log)
			return fmt.Errorf("%s ended: %s", m.Name, text)
		case <-ctx.Done():
			text, _ := os.ReadFile(m.log)
			return fmt.Errorf("%s does not answer: %w; its log: %s", m.Name, err, text)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// URL is where the member serves HTTP.
func (m *Member) URL() string { return m.clientURL }

// Stop ends the process well.
func (m *Member) Stop(testutil.TB) {
	if m.cmd == nil {
		return
	}
	_ = m.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-m.exited:
	case <-time.After(stopTimeout):
		_ = m.cmd.Process.Kill()
		<-m.exited
	}
	m.cmd = nil
}

// Restart starts the process again, with its data.
func (m *Member) Restart(testutil.TB) error {
	if err := m.start(); err != nil {
		return err
	}
	return m.connect()
}

// Client is a client of that member.
func (c *Cluster) Client(i int) *clientv3.Client { return c.Members[i].Client }

// TakeClient gives a client away.
func (c *Cluster) TakeClient(i int) { c.Members[i].Client = nil }

// RandClient is a client of any member.
func (c *Cluster) RandClient() *clientv3.Client { return c.Members[rand.Intn(len(c.Members))].Client }

// Endpoints are those of all members.
func (c *Cluster) Endpoints() []string {
	var endpoints []string
	for _, member := range c.Members {
		endpoints = append(endpoints, member.clientURL)
	}
	return endpoints
}

// WaitLeader returns the index of the member that leads.
func (c *Cluster) WaitLeader(t testutil.TB) int {
	for deadline := time.Now().Add(readyTimeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		for i, member := range c.Members {
			if member.cmd == nil {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			status, err := member.Client.Status(ctx, member.clientURL)
			cancel()
			if err == nil && status.Leader == status.Header.MemberId {
				return i
			}
		}
	}
	t.Fatal("no leader")
	return -1
}

// Terminate ends the cluster and removes its data.
func (c *Cluster) Terminate(testutil.TB) {
	var group sync.WaitGroup
	for _, member := range c.Members {
		if member.Client != nil {
			_ = member.Client.Close()
		}
		group.Add(1)
		go func() {
			defer group.Done()
			member.Stop(nil)
		}()
	}
	group.Wait()
	if c.dir != "" {
		_ = os.RemoveAll(c.dir)
	}
}

// MakeSingleNodeClients makes clients of member 0 and collects them.
func MakeSingleNodeClients(t testutil.TB, c *Cluster, clients *[]*clientv3.Client) func() *clientv3.Client {
	return makeClients(t, c, clients, func() int { return 0 })
}

// MakeMultiNodeClients makes clients of any members and collects them.
func MakeMultiNodeClients(t testutil.TB, c *Cluster, clients *[]*clientv3.Client) func() *clientv3.Client {
	return makeClients(t, c, clients, func() int { return rand.Intn(len(c.Members)) })
}

func makeClients(t testutil.TB, c *Cluster, clients *[]*clientv3.Client, choose func() int) func() *clientv3.Client {
	var lock sync.Mutex
	return func() *clientv3.Client {
		client, err := clientv3.New(clientv3.Config{
			Endpoints: []string{c.Members[choose()].clientURL}, DialTimeout: 5 * time.Second,
		})
		if err != nil {
			t.Fatal(err)
		}
		lock.Lock()
		defer lock.Unlock()
		*clients = append(*clients, client)
		return client
	}
}

// CloseClients closes them all.
func CloseClients(t testutil.TB, clients []*clientv3.Client) {
	for _, client := range clients {
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
