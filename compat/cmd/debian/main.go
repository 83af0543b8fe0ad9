// Command debian stores this machine's Debian package lists in a running server and checks everything that comes
// back against its own record: lists, old revisions, watches, compaction, kill -9 and restarts.
//
// It starts the servers itself, one after the other, in temporary directories. Exit code: 0 all as it should be,
// 1 something is not, 2 it could not run.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func checksumOf(s string) [sha256.Size]byte { return sha256.Sum256([]byte(s)) }

// report is the table at the end: a row for each number, a column for each server.
type report struct {
	names, columns []string
	cells          map[[2]string]string
}

func (t *report) add(column, name, value string) {
	if !slices.Contains(t.names, name) {
		t.names = append(t.names, name)
	}
	if !slices.Contains(t.columns, column) {
		t.columns = append(t.columns, column)
	}
	t.cells[[2]string{column, name}] = value
}

func (t *report) print(out io.Writer) error {
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	row := func(name string, cell func(column string) string) {
		fmt.Fprint(table, name)
		for _, c := range t.columns {
			fmt.Fprint(table, "\t", cell(c))
		}
		fmt.Fprintln(table)
	}
	fmt.Fprintln(table)
	row("", func(c string) string { return c })
	for _, name := range t.names {
		row(name, func(c string) string { return t.cells[[2]string{c, name}] })
	}
	return table.Flush()
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

const defaultMetastore = "metastore"

func main() {
	os.Exit(realMain())
}

func realMain() int {
	var serverFlags list
	metastore := flag.String("metastore", "", "the metastore binary; else the environment's METASTORE_BIN, else metastore on the PATH")
	storage := flag.String("storage", "rocksdb", "the storage engines to run it with: rocksdb, memory, or both with a comma between")
	against := flag.String("against", "", "etcd: run it against the real etcd; with --storage given too, against both")
	etcd := flag.String("etcd", "", "the etcd binary; else the one beside this program")
	input := flag.String("input", "", "a file of stanzas to store, instead of what apt-cache dumpavail prints")
	most := flag.Int("limit", 0, "store so many stanzas at most; 0 is all")
	workers := flag.Int("workers", 64, "how many write at a time")
	seed := flag.Uint64("seed", 1, "the seed of everything that is random")
	limit := flag.Duration("timeout", 15*time.Minute, "the most time that one server may take")
	dir := flag.String("dir", "", "where to make the temporary directories; else the system's place for them")
	keep := flag.Bool("keep", false, "keep them")
	flag.Var(&serverFlags, "server-flag", "a flag for the server, as --name=value; may be repeated")
	flag.Parse()
	storageGiven := false
	flag.Visit(func(f *flag.Flag) { storageGiven = storageGiven || f.Name == "storage" })
	couldNot := func(err error) int {
		fmt.Fprintln(os.Stderr, "debian:", err)
		return 2
	}
	if flag.NArg() > 0 {
		return couldNot(fmt.Errorf("%q is not a flag", flag.Arg(0)))
	}
	if *workers < 1 {
		return couldNot(errors.New("--workers has to be at least 1"))
	}

	var targets []target
	if *against == "" || storageGiven {
		binary := *metastore
		if binary == "" {
			binary = os.Getenv("METASTORE_BIN")
		}
		if binary == "" {
			binary = defaultMetastore
		}
		for engine := range strings.SplitSeq(*storage, ",") {
			if engine != "rocksdb" && engine != "memory" {
				return couldNot(fmt.Errorf("--storage %q: rocksdb and memory are there", engine))
			}
			targets = append(targets, target{name: engine, binary: binary, flags: append([]string{"--storage=" + engine}, serverFlags...)})
		}
	}
	switch *against {
	case "":
	case "etcd":
		binary := *etcd
		if binary == "" {
			self, err := os.Executable()
			if err != nil {
				return couldNot(err)
			}
			binary = filepath.Join(filepath.Dir(self), "etcd")
		}
		t := target{name: "etcd", binary: binary, etcd: true}
		if len(targets) == 0 {
			t.flags = serverFlags
		}
		targets = append(targets, t)
	default:
		return couldNot(fmt.Errorf("--against %q: only etcd is there", *against))
	}
	for i := range targets {
		path, err := exec.LookPath(targets[i].binary)
		if err == nil {
			path, err = filepath.Abs(path)
		}
		if err != nil {
			return couldNot(err)
		}
		targets[i].binary = path
	}

	stanzas, err := readStanzas(*input, *most)
	if err != nil {
		return couldNot(err)
	}
	seen := map[string]bool{}
	var packages []string
	for _, s := range stanzas {
		if !seen[s.pkg] {
			seen[s.pkg] = true
			packages = append(packages, s.pkg)
		}
	}

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		s := <-signals
		current.Lock()
		if current.process != nil {
			_ = current.process.Kill()
			_, _ = current.process.Wait()
		}
		if current.dir != "" && !*keep {
			_ = os.RemoveAll(current.dir)
		}
		fmt.Fprintln(os.Stderr, "debian: ended by", s)
		os.Exit(2)
	}()

	table := &report{cells: map[[2]string]string{}}
	bad := 0
	for _, t := range targets {
		err := one(t, stanzas, packages, table, *dir, *keep, *workers, *seed, *limit)
		if err != nil {
			bad++
			fmt.Printf("%-16s FAILED: %v\n", t.name, err)
			table.add(t.name, "result", "FAILED")
		} else {
			table.add(t.name, "result", "all as it should be")
		}
	}
	if err := table.print(os.Stdout); err != nil {
		return couldNot(err)
	}
	if bad > 0 {
		return 1
	}
	return 0
}

func one(t target, stanzas []stanza, packages []string, table *report, parent string, keep bool, workers int, seed uint64, limit time.Duration) (err error) {
	dir, err := os.MkdirTemp(parent, "debian-"+t.name+"-")
	if err != nil {
		return err
	}
	current.Lock()
	current.dir = dir
	current.Unlock()
	s, err := newServer(t, dir)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), limit, fmt.Errorf("not done within %v", limit))
	defer cancel()
	r := &run{ctx: ctx, s: s, stanzas: stanzas, packages: packages, workers: workers,
		random: rand.New(rand.NewPCG(seed, seed)), report: table, out: os.Stdout}
	began := time.Now()
	err = r.all()
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w (%w)", err, context.Cause(ctx))
	}
	s.kill()
	current.Lock()
	current.process = nil
	current.Unlock()
	if err != nil {
		fmt.Printf("The last lines of the server's log:\n%s\n", s.lastLog(20))
	}
	if keep || err != nil {
		fmt.Printf("%-16s what it stored and its log are kept in %s\n", t.name, dir)
	} else if err := os.RemoveAll(dir); err != nil {
		return err
	}
	r.note("whole run", "%.1f s", time.Since(began).Seconds())
	return err
}
