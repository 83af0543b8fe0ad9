package netfault

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// pipe is one connection that member `from` opened to member `to`, and its other half to the member itself.
type pipe struct {
	net      *Network
	from, to int
	opener   *net.TCPConn

	mu     sync.Mutex
	target *net.TCPConn
	closed chan struct{}
	lost   atomic.Bool  // bytes of it were discarded, in some direction: it cannot go on
	late   atomic.Int64 // nanoseconds that what is under way is held back further
}

const (
	chunkBytes  = 32 << 10
	sliceBytes  = 2 << 10 // of a slow link
	underWayMax = 256     // chunks
)

type chunk struct {
	data []byte
	due  time.Time
}

func (p *pipe) run() {
	there, back := p.net.links[p.from][p.to], p.net.links[p.to][p.from]
	// A new connection waits until the network would let its handshake through.
	for {
		rule, changed := there.get()
		other, otherChanged := back.get()
		if rule.Mode == Reset || other.Mode == Reset {
			return
		}
		if rule.Mode == Pass && other.Mode == Pass {
			break
		}
		if rule.Mode == Discard || other.Mode == Discard {
			p.lost.Store(true)
		}
		select {
		case <-changed:
		case <-otherChanged:
		case <-p.closed:
			return
		}
		if p.lost.Load() {
			return
		}
	}
	conn, err := net.DialTimeout("tcp", p.net.targets[p.to].Dial, 2*time.Second)
	if err != nil {
		return
	}
	target := conn.(*net.TCPConn)
	p.mu.Lock()
	select {
	case <-p.closed:
		p.mu.Unlock()
		hardClose(target)
		return
	default:
	}
	p.target = target
	p.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { p.pump(p.opener, target, there) })
	both.Go(func() { p.pump(target, p.opener, back) })
	both.Wait()
}

// pump carries the bytes of one direction.
func (p *pipe) pump(src, dst *net.TCPConn, l *link) {
	queue := make(chan chunk, underWayMax)
	var lost atomic.Bool // in this direction
	go func() {
		defer close(queue)
		p.read(src, queue, l)
	}()
	err := p.write(dst, queue, l, &lost)
	switch {
	case err == nil:
		_ = dst.CloseWrite()
	default:
		if p.late.Load() == 0 {
			p.reset()
		}
		for range queue { // until the reader has noticed
		}
	}
}

func (p *pipe) read(src *net.TCPConn, queue chan<- chunk, l *link) {
	own := rand.Float64()
	var last time.Time
	for {
		buf := make([]byte, chunkBytes)
		n, err := src.Read(buf)
		if n > 0 {
			rule, _ := l.get()
			due := time.Now().Add(rule.Delay)
			if rule.Jitter > 0 {
				// Half of it is the connection's own, so that connections overtake each other.
				due = due.Add(time.Duration((own + rand.Float64()) / 2 * float64(rule.Jitter)))
			}
			if due.Before(last) {
				due = last
			}
			last = due
			if rule.Delay > 0 || rule.Jitter > 0 {
				p.net.Done.DelayedBytes.Add(int64(n))
			}
			select {
			case queue <- chunk{buf[:n:n], due}:
			case <-p.closed:
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && p.late.Load() == 0 {
				p.reset()
			}
			return
		}
	}
}

var errClosed = errors.New("closed")

func (p *pipe) write(dst *net.TCPConn, queue <-chan chunk, l *link, lost *atomic.Bool) error {
	for c := range queue {
		if err := p.sleep(time.Until(c.due) + time.Duration(p.late.Load())); err != nil {
			return err
		}
		for len(c.data) > 0 {
			rule, changed := l.get()
			switch rule.Mode {
			case Hold:
				p.net.Done.HeldBytes.Add(int64(len(c.data)))
				select {
				case <-changed:
				case <-p.closed:
					return errClosed
				}
				continue
			case Reset:
				return errClosed
			}
			if rule.Mode == Discard || lost.Load() {
				p.net.Done.DiscardedBytes.Add(int64(len(c.data)))
				lost.Store(true)
				p.lost.Store(true)
				break
			}
			part := c.data
			if rule.BytesPerSecond > 0 {
				part = part[:min(len(part), sliceBytes)]
				p.net.Done.SlowedBytes.Add(int64(len(part)))
				if err := p.sleep(time.Duration(float64(len(part)) / float64(rule.BytesPerSecond) * 1e9)); err != nil {
					return err
				}
			}
			if _, err := dst.Write(part); err != nil {
				return err
			}
			if p.late.Load() > 0 {
				p.net.Done.LateBytes.Add(int64(len(part)))
			}
			c.data = c.data[len(part):]
		}
	}
	select {
	case <-p.closed:
		return errClosed
	default:
		return nil
	}
}

func (p *pipe) sleep(d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-p.closed:
		return errClosed
	}
}

// reset breaks the connection on both sides.
func (p *pipe) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.closed:
		return
	default:
	}
	close(p.closed)
	hardClose(p.opener)
	if p.target != nil {
		hardClose(p.target)
	}
}

// overtake breaks the connection for the sender only: what it has sent still arrives, but later than what it sends on its
// next connection.
func (p *pipe) overtake(fromOpener bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.target == nil || p.late.Load() != 0 {
		return
	}
	p.net.Done.Overtaken.Add(1)
	p.late.Store(int64(100+rand.IntN(400)) * int64(time.Millisecond))
	if fromOpener {
		hardClose(p.opener)
	} else {
		hardClose(p.target)
	}
	time.AfterFunc(time.Second, p.reset)
}
