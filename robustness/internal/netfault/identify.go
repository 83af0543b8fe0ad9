package netfault

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

// identify tells which member opened an accepted connection. All members share one address, and one advertised URL
// leads to one proxy, so the connection itself does not tell; the kernel does: its table of connections names the inode
// of the other end's socket, and one of the members' processes has that inode open.
func identify(conn net.Conn, pids func() map[int]int) (int, error) {
	src := netip.MustParseAddrPort(conn.RemoteAddr().String())
	dst := netip.MustParseAddrPort(conn.LocalAddr().String())
	// A process that was forked a moment ago may not be in the list yet.
	for attempt := range 20 {
		if attempt > 0 {
			time.Sleep(10 * time.Millisecond)
		}
		inode, err := socketInode(src, dst)
		if err != nil {
			return 0, err // the other end is gone
		}
		want := fmt.Sprintf("socket:[%s]", inode)
		for pid, member := range pids() {
			dir := fmt.Sprintf("/proc/%d/fd", pid)
			entries, err := os.ReadDir(dir)
			if err != nil {
				continue
			}
			for _, e := range entries {
				if link, err := os.Readlink(dir + "/" + e.Name()); err == nil && link == want {
					return member, nil
				}
			}
		}
	}
	return 0, fmt.Errorf("no member owns the connection from %s", src)
}

func socketInode(local, remote netip.AddrPort) (string, error) {
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		file, err := os.Open(table)
		if err != nil {
			continue
		}
		inode, found := searchTable(file, local, remote)
		file.Close()
		if found {
			return inode, nil
		}
	}
	return "", fmt.Errorf("no socket %s to %s", local, remote)
}

func searchTable(file *os.File, local, remote netip.AddrPort) (string, bool) {
	// A plain comparison of the port skips nearly every line.
	localPort, remotePort := fmt.Sprintf(":%04X", local.Port()), fmt.Sprintf(":%04X", remote.Port())
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 10 || !strings.HasSuffix(f[1], localPort) || !strings.HasSuffix(f[2], remotePort) || f[9] == "0" {
			continue
		}
		if hexAddr(f[1]) == local.Addr().Unmap() && hexAddr(f[2]) == remote.Addr().Unmap() {
			return f[9], true
		}
	}
	return "", false
}

// hexAddr reads an address as the kernel prints it: words of 32 bits in the machine's byte order.
func hexAddr(text string) netip.Addr {
	digits, _, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(digits)
	if err != nil || len(raw)%4 != 0 {
		return netip.Addr{}
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	addr, _ := netip.AddrFromSlice(raw)
	return addr.Unmap()
}
