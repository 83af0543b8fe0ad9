// Command grpcdiff sends the same raw requests to several servers and compares their answers.
//
// It reaches what etcdctl cannot express: unknown enums, nested transactions, watch streams, malformed requests, and
// the HTTP side. Requests come in groups; a group expects servers that have done nothing yet, so grpcdiff.py starts
// fresh ones for each. Exit code: 0 all equal, 1 differences, 2 it could not run.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// group is a list of requests, run on every server by itself; what it records is compared.
type group struct {
	name  string
	about string
	// flags the servers must be started with.
	flags []string
	// later marks services that come after the first version.
	later bool
	run   func(t *session)
}

var groups []group

func register(g group) { groups = append(groups, g) }

const groupMax = 3 * time.Minute

type urls []string

func (u *urls) String() string     { return strings.Join(*u, " ") }
func (u *urls) Set(s string) error { *u = append(*u, s); return nil }

func main() {
	var servers urls
	flag.Var(&servers, "server", "label=URL of a server; the first one given is the reference")
	only := flag.String("group", "", "the group to run")
	list := flag.Bool("list", false, "list the groups: name, later or now, server flags, what it is about")
	verbose := flag.Bool("verbose", false, "print every request with the reference's answer")
	exactIDs := flag.Bool("exact-ids", false, "compare cluster and member ids too")
	flag.Parse()

	if *list {
		for _, g := range groups {
			when := "now"
			if g.later {
				when = "later"
			}
			fmt.Printf("%s\t%s\t%s\t%s\n", g.name, when, strings.Join(g.flags, " "), g.about)
		}
		return
	}
	for _, g := range groups {
		if g.name == *only {
			if len(servers) < 2 {
				fail("give two servers or more")
			}
			os.Exit(compare(g, servers, *verbose, *exactIDs))
		}
	}
	fail("no group %q", *only)
}

func fail(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "grpcdiff: "+format+"\n", args...)
	os.Exit(2)
}

// compare runs a group on all servers at once and prints where they differ.
func compare(g group, servers urls, verbose, exactIDs bool) int {
	sessions := make([]*session, len(servers))
	for i, s := range servers {
		label, url, ok := strings.Cut(s, "=")
		if !ok {
			fail("-server %s is not label=URL", s)
		}
		t, err := newSession(label, url, exactIDs)
		if err != nil {
			fail("%s: %v", label, err)
		}
		sessions[i] = t
	}
	begin := time.Now()
	timer := time.AfterFunc(groupMax, func() { fail("%s takes more than %s", g.name, groupMax) })
	var wait sync.WaitGroup
	for _, t := range sessions {
		wait.Add(1)
		go func() {
			defer wait.Done()
			defer t.close()
			g.run(t)
		}()
	}
	wait.Wait()
	timer.Stop()

	reference := sessions[0].records
	others := make([]map[string]record, len(sessions))
	for i, t := range sessions {
		others[i] = numbered(t.records)
	}
	different := 0
	meant := map[string]int{}
	count := map[string]int{}
	for _, want := range reference {
		if verbose {
			fmt.Printf("    %s\n        %s\n", cut(want.request), cut(want.answer))
		}
		count[want.request]++
		key := nth(want.request, count[want.request])
		wrong := false
		for i, t := range sessions[1:] {
			got, ok := others[i+1][key]
			delete(others[i+1], key)
			if ok && got.answer == want.answer {
				continue
			}
			if want.meant != "" {
				meant[want.meant]++
				continue
			}
			if !wrong {
				fmt.Printf("  differs: %s\n    %s: %s\n", cut(want.request), sessions[0].label, cut(want.answer))
				wrong = true
			}
			if ok {
				fmt.Printf("    %s: %s\n", t.label, around(want.answer, got.answer))
			} else {
				fmt.Printf("    %s: nothing\n", t.label)
			}
		}
		if wrong {
			different++
		}
	}
	for i, t := range sessions[1:] {
		for _, key := range sorted(others[i+1]) {
			got := others[i+1][key]
			if got.meant != "" {
				meant[got.meant]++
				continue
			}
			request, _, _ := strings.Cut(key, "\x00")
			fmt.Printf("  differs: %s\n    %s: nothing\n    %s: %s\n", cut(request), sessions[0].label, t.label, cut(got.answer))
			different++
		}
	}
	for _, reason := range sorted(meant) {
		fmt.Printf("  meant, %d answers: %s\n", meant[reason], reason)
	}
	verdict := "equal   "
	if different > 0 {
		verdict = "DIFFERS "
	}
	fmt.Printf("%s %s: %d requests, %d differ (%.1f s)\n", verdict, g.name, len(reference), different, time.Since(begin).Seconds())
	if different > 0 {
		return 1
	}
	return 0
}

// numbered gives the answers by request, the first, second and so on of equal ones apart. So a response too many or
// too few is one difference, and not one for everything after it.
func numbered(records []record) map[string]record {
	answers, count := map[string]record{}, map[string]int{}
	for _, r := range records {
		count[r.request]++
		answers[nth(r.request, count[r.request])] = r
	}
	return answers
}

func nth(request string, n int) string { return fmt.Sprintf("%s\x00%06d", request, n) }

const cutBytes = 1200

func cut(s string) string {
	if len(s) > cutBytes {
		return fmt.Sprintf("%s… (%d bytes)", s[:cutBytes], len(s))
	}
	return s
}

// around is the answer, or, of one too long to print, the part where it first differs from the reference's.
func around(want, got string) string {
	if len(got) <= cutBytes {
		return got
	}
	at := 0
	for at < len(want) && at < len(got) && want[at] == got[at] {
		at++
	}
	at = max(0, at-cutBytes/4)
	return fmt.Sprintf("from byte %d: %s", at, cut(got[at:]))
}
