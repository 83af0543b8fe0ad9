package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sort"
	"strings"
)

// stanza is one package version of the machine's Debian package lists.
type stanza struct {
	pkg, key string
	text     []byte
}

const (
	prefix   = "/debian/"
	hotKeys  = 16
	indexOf  = "/index/"
	longLine = 16 << 20
)

// neighbours are keys just outside of the prefix, and inside of it in ways that a listing could get wrong.
var neighbours = []string{"/debiam", "/debian", "/debian!", "/debian.", "/debian0", "/debiao", "\x00", "\xff\xff"}

func hotKey(i int) string { return fmt.Sprintf("/hot/%02d", i) }

// readStanzas reads them from a file, or from apt-cache when there is none.
func readStanzas(file string, most int) ([]stanza, error) {
	var in io.Reader
	var finish func() error
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		in, finish = f, f.Close
	} else {
		cmd := exec.Command("apt-cache", "dumpavail")
		out, err := cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		if err := cmd.Start(); err != nil {
			return nil, fmt.Errorf("apt-cache dumpavail: %w", err)
		}
		in, finish = out, cmd.Wait
	}
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 1<<20), longLine)
	var all []stanza
	var text bytes.Buffer
	var pkg, version string
	end := func() {
		if pkg != "" && version != "" && (most == 0 || len(all) < most) {
			all = append(all, stanza{pkg: pkg, key: prefix + pkg + "/" + version, text: bytes.Clone(text.Bytes())})
		}
		text.Reset()
		pkg, version = "", ""
	}
	for lines.Scan() {
		line := lines.Text()
		if line == "" {
			end()
			continue
		}
		if v, ok := strings.CutPrefix(line, "Package: "); ok {
			pkg = v
		} else if v, ok := strings.CutPrefix(line, "Version: "); ok {
			version = v
		}
		text.WriteString(line)
		text.WriteByte('\n')
	}
	end()
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if err := finish(); err != nil {
		return nil, fmt.Errorf("reading the package lists: %w", err)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("the package lists are empty; apt-get update fills them")
	}
	return all, nil
}

// universe is every key that this program ever writes, in key order.
func universe(all []stanza) []string {
	set := map[string]bool{}
	for _, s := range all {
		set[s.key] = true
		set[indexOf+s.pkg] = true
	}
	for _, k := range neighbours {
		set[k] = true
	}
	for i := range hotKeys {
		set[hotKey(i)] = true
	}
	keys := make([]string, 0, len(set))
	for k := range set {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
