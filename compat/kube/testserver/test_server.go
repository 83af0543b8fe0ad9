// Package testserver has what the tests of k8s.io/apiserver's storage layer use of the package of that name, over servers
// that are processes of their own: those of the binary that METASTORE_COMPAT_BINARY names. kube_storage.py puts it in the
// place of the original, which runs etcd within the test, and leaves the tests as they are.
package testserver

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	storagetesting "k8s.io/apiserver/pkg/storage/testing"
)

const (
	readyTimeout = 60 * time.Second
	stopTimeout  = 10 * time.Second
)

// NewTestConfig is the configuration of a member that is alone, on free ports.
func NewTestConfig(t testing.TB) *embed.Config {
	cfg := embed.NewConfig()
	var urls []url.URL
	for range 2 {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		urls = append(urls, url.URL{Scheme: "http", Host: fmt.Sprintf("localhost:%d", listener.Addr().(*net.TCPAddr).Port)})
	}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = urls[:1:1], []url.URL{urls[0]}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = urls[1:], []url.URL{urls[1]}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.Dir = t.TempDir()
	return cfg
}

// RunEtcd starts a server and returns a client of it, which counts its calls. The server ends with the test.
func RunEtcd(t testing.TB, cfg *embed.Config) *kubernetes.Client {
	t.Helper()
	if cfg == nil {
		cfg = NewTestConfig(t)
	}
	client := cfg.AdvertiseClientUrls[0].String()
	args := []string{
		"--name", cfg.Name, "--data-dir", filepath.Join(cfg.Dir, "data"),
		"--listen-client-urls", cfg.ListenClientUrls[0].String(), "--advertise-client-urls", client,
		"--listen-peer-urls", cfg.ListenPeerUrls[0].String(),
		"--initial-advertise-peer-urls", cfg.AdvertisePeerUrls[0].String(), "--initial-cluster", cfg.InitialCluster,
		"--quota-backend-bytes", fmt.Sprint(cfg.QuotaBackendBytes), "--max-request-bytes", fmt.Sprint(cfg.MaxRequestBytes),
		"--watch-progress-notify-interval", cfg.WatchProgressNotifyInterval.String(), "--log-level", "warn",
	}
	if tls := cfg.ClientTLSInfo; tls.CertFile != "" {
		args = append(args, "--cert-file", tls.CertFile, "--key-file", tls.KeyFile, "--trusted-ca-file", tls.TrustedCAFile)
	}
	server := exec.Command(os.Getenv("METASTORE_COMPAT_BINARY"), args...)
	log, err := os.Create(filepath.Join(cfg.Dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	server.Stdout, server.Stderr = log, log
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(stopTimeout, func() { _ = server.Process.Kill() })
		_ = server.Wait()
		late.Stop()
		if said, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("the server's log: %s", said)
		}
	})

	tlsConfig, err := cfg.ClientTLSInfo.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	result, err := kubernetes.New(clientv3.Config{
		TLS: tlsConfig, Endpoints: []string{client}, DialTimeout: 10 * time.Second,
		Logger: zaptest.NewLogger(t, zaptest.Level(zapcore.ErrorLevel)).Named("etcd-client"),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), readyTimeout)
	defer cancel()
	for _, err = result.Client.Get(ctx, "ready"); err != nil; _, err = result.Client.Get(ctx, "ready") {
		if ctx.Err() != nil {
			t.Fatalf("the server does not start: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	recorder := storagetesting.NewKubernetesRecorder(result.Kubernetes)
	result.KV = storagetesting.NewKVRecorder(result.KV, recorder)
	result.Kubernetes = recorder
	return result
}
