package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const password = "secret"

// serve runs a server on a data directory while use runs, and stops it again. Once users are in force the client is root.
func serve(binary, dataDir string, use func(client *clientv3.Client, endpoint string) error) (err error) {
	var urls [2]string
	for i := range urls {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		urls[i] = "http://" + listener.Addr().String()
		listener.Close()
	}
	log, err := os.Create(dataDir + ".log")
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{
		"--data-dir", dataDir, "--name", "default", "--quota-backend-bytes", "8589934592",
		"--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
		"--listen-peer-urls", urls[1], "--snapshot-count", "10000",
	}
	if binary == *metastore {
		args = append(args, "--storage", *storage)
	}
	server := exec.Command(binary, args...)
	server.Stdout, server.Stderr = log, log
	if err := server.Start(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- server.Wait() }()
	defer func() {
		server.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(30 * time.Second):
			server.Process.Kill()
			err = errors.Join(err, fmt.Errorf("%s did not stop", binary))
		}
	}()
	for _, user := range []string{"", "root"} {
		config := clientv3.Config{
			Endpoints:          []string{urls[0]},
			DialTimeout:        30 * time.Second,
			Logger:             zap.NewNop(),
			MaxCallRecvMsgSize: 1 << 30,
			Username:           user,
		}
		if user != "" {
			config.Password = password
		}
		client, err := clientv3.New(config)
		if err != nil {
			return fmt.Errorf("%s as %q: %w", binary, user, err)
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		_, err = client.Get(ctx, "ready", clientv3.WithCountOnly())
		if err == nil {
			return use(client, urls[0])
		}
		if !strings.Contains(err.Error(), "user name is empty") {
			return fmt.Errorf("%s: %w; its log is %s", binary, err, log.Name())
		}
	}
	return fmt.Errorf("%s lets nobody in", binary)
}

// command runs a program; an error has what it said.
func command(program string, args ...string) error {
	_, err := output(program, args...)
	return err
}

func output(program string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	run := exec.Command(program, args...)
	run.Stdout, run.Stderr = &stdout, &stderr
	if err := run.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

func save(endpoint, path string) error {
	os.Remove(path)
	etcdctl := filepath.Join(*etcdDir, "etcdctl")
	args := []string{"--endpoints", endpoint, "snapshot", "save", path}
	if *users {
		args = append(args, "--user", "root:"+password)
	}
	return command(etcdctl, args...)
}

func restore(file, dataDir string, flags ...string) error {
	args := append([]string{"snapshot", "restore", file, "--data-dir", dataDir, "--storage", *storage}, flags...)
	return command(*metastore, args...)
}

// equalStatus compares what etcdutl and metastore say of a file.
func equalStatus(file string) error {
	theirs, err := output(filepath.Join(*etcdDir, "etcdutl"), "snapshot", "status", file, "--write-out", "json")
	if err != nil {
		return err
	}
	ours, err := output(*metastore, "snapshot", "status", file, "--write-out", "json")
	if err != nil {
		return err
	}
	if strings.TrimSpace(theirs) != strings.TrimSpace(ours) {
		return fmt.Errorf("status of %s: etcdutl says %s, metastore %s", file, theirs, ours)
	}
	fmt.Print("status: ", ours)
	return nil
}

// equalHashes compares the hashes of the history that etcdutl makes of two files.
func equalHashes(a, b string) error {
	var hashes [2]string
	for i, file := range []string{a, b} {
		// Of copies: it opens a file for writing, after which the hash at its end does not fit any more.
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := os.WriteFile(file+".copy", content, 0o600); err != nil {
			return err
		}
		hash, err := output(filepath.Join(*etcdDir, "etcdutl"), "hashkv", file+".copy", "--write-out", "json")
		if err != nil {
			return err
		}
		hashes[i] = strings.TrimSpace(hash)
	}
	if hashes[0] != hashes[1] {
		return fmt.Errorf("etcdutl hashkv: %s of etcd's snapshot, %s of metastore's", hashes[0], hashes[1])
	}
	fmt.Println("hashkv:", hashes[0])
	return nil
}
