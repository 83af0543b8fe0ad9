package cluster

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
)

// freePort finds a port that can be listened on. Members are restarted on their ports, so these lie outside the range
// from which the kernel takes the ports of outgoing connections.
func freePort(taken map[int]bool) (int, error) {
	low := 32768
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		var a, b int
		if n, _ := fmt.Sscan(string(text), &a, &b); n == 2 {
			low = a
		}
	}
	first := 10000
	if low <= first+1000 {
		first, low = 1025, max(low, 2000)
	}
	for range 1000 {
		port := first + rand.IntN(low-first)
		if taken[port] {
			continue
		}
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		l.Close()
		taken[port] = true
		return port, nil
	}
	return 0, fmt.Errorf("no free port between %d and %d", first, low)
}
