package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	readyMax = 60 * time.Second
	stopMax  = 30 * time.Second
	callMax  = 60 * time.Second
	pollGap  = 2 * time.Millisecond
)

// target is a kind of server to run everything against.
type target struct {
	name, binary string
	flags        []string
	etcd         bool
}

// server is one process of it. Restarts keep directory and port.
type server struct {
	target
	dir, dataDir, logFile string
	port, peerPort        int
	cmd                   *exec.Cmd
	exited                chan struct{}
	exit                  error
	peakKiB               int64
	watchStreams          atomic.Int64
}

// spawned runs its argument on one thread that lives as long as this program: the kernel kills a server when the
// thread that started it ends, so no server outlives this program, however it ends.
var spawned = func() func(func()) {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return func(f func()) {
		done := make(chan struct{})
		work <- func() { f(); close(done) }
		<-done
	}
}()

// current is the server that a signal to this program has to end.
var current struct {
	sync.Mutex
	process *os.Process
	dir     string
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func newServer(t target, dir string) (*server, error) {
	s := &server{target: t, dir: dir, dataDir: filepath.Join(dir, "data"), logFile: filepath.Join(dir, "server.log")}
	var err error
	if s.port, err = freePort(); err != nil {
		return nil, err
	}
	s.peerPort, err = freePort()
	return s, err
}

func (s *server) url() string { return fmt.Sprintf("http://127.0.0.1:%d", s.port) }

func (s *server) args() []string {
	args := []string{"--data-dir", s.dataDir, "--listen-client-urls", s.url(), "--advertise-client-urls", s.url()}
	if s.etcd {
		peer := fmt.Sprintf("http://127.0.0.1:%d", s.peerPort)
		args = append(args, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	}
	return append(args, s.flags...)
}

// start starts the process and returns the time until it answered a linearizable read.
func (s *server) start(ctx context.Context) (time.Duration, error) {
	log, err := os.OpenFile(s.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd := exec.Command(s.binary, s.args()...)
	cmd.Dir = s.dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "ETCD_") && !strings.HasPrefix(v, "METASTORE_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	began := time.Now()
	current.Lock()
	spawned(func() { err = cmd.Start() })
	if err == nil {
		current.process = cmd.Process
	}
	current.Unlock()
	if err != nil {
		return 0, err
	}
	s.cmd, s.exited = cmd, make(chan struct{})
	go func() {
		s.exit = cmd.Wait()
		close(s.exited)
	}()
	ctx, cancel := context.WithTimeout(ctx, readyMax)
	defer cancel()
	for !s.healthy(ctx) {
		select {
		case <-s.exited:
			return 0, fmt.Errorf("the server ended before it was ready: %v", s.exit)
		case <-ctx.Done():
			return 0, fmt.Errorf("the server was not ready after %v", time.Since(began).Round(time.Millisecond))
		case <-time.After(pollGap):
		}
	}
	c, err := s.dial()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if _, err := c.Get(ctx, "/"); err != nil {
		return 0, fmt.Errorf("the first read after the start: %w", err)
	}
	return time.Since(began), nil
}

func (s *server) healthy(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url()+"/health", nil)
	if err != nil {
		return false
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode == http.StatusOK
}

// end sends the signal to this very process and waits for its end. It returns how long that took.
func (s *server) end(sig syscall.Signal) (time.Duration, error) {
	s.measure()
	select {
	case <-s.exited:
		return 0, fmt.Errorf("the server ended by itself: %v", s.exit)
	default:
	}
	began := time.Now()
	if err := s.cmd.Process.Signal(sig); err != nil {
		return 0, err
	}
	select {
	case <-s.exited:
	case <-time.After(stopMax):
		_ = s.cmd.Process.Kill()
		<-s.exited
		return 0, fmt.Errorf("the server did not end within %v of signal %v", stopMax, sig)
	}
	took := time.Since(began)
	status := s.cmd.ProcessState.Sys().(syscall.WaitStatus)
	// etcd, once it has stopped cleanly, ends itself with the signal it got.
	if status.Signaled() && status.Signal() == sig || status.Exited() && status.ExitStatus() == 0 {
		return took, nil
	}
	return took, fmt.Errorf("after signal %v the server ended with %v", sig, s.exit)
}

func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	<-s.exited
}

func (s *server) alive() error {
	select {
	case <-s.exited:
		return fmt.Errorf("the server ended by itself: %v", s.exit)
	default:
		return nil
	}
}

// measure reads the process's largest resident set, in KiB, since its start or since forgetPeak.
func (s *server) measure() int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "VmHWM:" {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			s.peakKiB = max(s.peakKiB, n)
			return n
		}
	}
	return 0
}

// forgetPeak makes the kernel measure the largest resident set anew, so that each phase shows its own.
func (s *server) forgetPeak() {
	const resetPeak = "5"
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.cmd.Process.Pid), []byte(resetPeak), 0)
}

// cpu is the processor time the process used so far.
func (s *server) cpu() time.Duration {
	const ticksPerSecond = 100
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(f[11], 10, 64)
	system, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * time.Second / ticksPerSecond
}

// onDisk is the space the data directory takes, in bytes. Files may vanish meanwhile.
func (s *server) onDisk() int64 {
	var n int64
	_ = filepath.WalkDir(s.dataDir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := e.Info(); err == nil {
			n += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	return n
}

func (s *server) lastLog(lines int) string {
	text, err := os.ReadFile(s.logFile)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// dial makes a client with a connection of its own. Its watch streams are counted, because the client reconnects
// a broken one without a word.
func (s *server) dial() (*clientv3.Client, error) {
	count := func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		if strings.HasSuffix(method, "/Watch") {
			s.watchStreams.Add(1)
		}
		return streamer(ctx, desc, conn, method, opts...)
	}
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{s.url()},
		DialTimeout: 10 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithChainStreamInterceptor(count)},
		Logger:      zap.NewNop(),
	})
}

func (s *server) dialMany(n int) ([]*clientv3.Client, error) {
	var all []*clientv3.Client
	for range n {
		c, err := s.dial()
		if err != nil {
			return nil, errors.Join(err, closeAll(all))
		}
		all = append(all, c)
	}
	return all, nil
}

func closeAll(all []*clientv3.Client) error {
	var errs []error
	for _, c := range all {
		if err := c.Close(); err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
