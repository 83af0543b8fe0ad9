package main

import (
	"fmt"
	"regexp"
	"sort"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// cleaner takes out of an answer what may differ between two servers that behave alike: identity, Raft's numbers,
// sizes on disk, remaining seconds, and lease ids chosen by the server. A number that is there stays there: it
// becomes 1, so that a missing one still differs.
type cleaner struct {
	exactIDs bool
	address  string
	leases   map[int64]int64
}

// alias gives a lease id chosen by the server a number of its own, the same on every server.
func (c *cleaner) alias(id int64) {
	if id != 0 && c.leases[id] == 0 {
		c.leases[id] = int64(1_000_001 + len(c.leases))
	}
}

func (c *cleaner) text(m proto.Message) string {
	m = proto.Clone(m)
	c.message(m.ProtoReflect())
	out, err := protojson.Marshal(m)
	if err != nil {
		return "cannot be printed: " + err.Error()
	}
	text := c.plain(compactJSON(out))
	if n := unknownBytes(m.ProtoReflect()); n > 0 {
		text += fmt.Sprintf(" and %d bytes of unknown fields", n)
	}
	return text
}

var (
	anyAddress = regexp.MustCompile(`(?:127\.0\.0\.1|localhost|\[::1\]):\d+`)
)

func (c *cleaner) plain(s string) string {
	s = strings.ReplaceAll(s, c.address, "<address>")
	return anyAddress.ReplaceAllString(s, "<address>")
}

const ttlSlack = 10

func (c *cleaner) message(m protoreflect.Message) {
	switch v := m.Interface().(type) {
	case *pb.ResponseHeader:
		one(&v.RaftTerm)
		if !c.exactIDs {
			one(&v.ClusterId)
			one(&v.MemberId)
		}
	case *pb.Member:
		if !c.exactIDs {
			one(&v.ID)
		}
	case *pb.StatusResponse:
		one(&v.RaftTerm)
		one(&v.RaftIndex)
		one(&v.RaftAppliedIndex)
		one(&v.DbSize)
		one(&v.DbSizeInUse)
		one(&v.DbSizeQuota)
		if !c.exactIDs {
			one(&v.Leader)
		}
	case *pb.LeaseTimeToLiveResponse:
		if v.TTL <= v.GrantedTTL && v.TTL >= v.GrantedTTL-ttlSlack && v.TTL >= 0 {
			v.TTL = v.GrantedTTL
		}
		// etcd lists them in the order of a Go map, that is in none.
		sort.Slice(v.Keys, func(i, j int) bool { return string(v.Keys[i]) < string(v.Keys[j]) })
	}
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap():
		case field.IsList() && field.Kind() == protoreflect.MessageKind:
			for i := range value.List().Len() {
				c.message(value.List().Get(i).Message())
			}
		case field.IsList():
		case field.Kind() == protoreflect.MessageKind:
			c.message(value.Message())
		case field.Kind() == protoreflect.Int64Kind && isLease(field):
			if alias := c.leases[value.Int()]; alias != 0 {
				m.Set(field, protoreflect.ValueOfInt64(alias))
			}
		}
		return true
	})
}

func isLease(field protoreflect.FieldDescriptor) bool {
	name := string(field.Name())
	return name == "lease" || name == "ID"
}

func one[N int64 | uint64](n *N) {
	if *n != 0 {
		*n = 1
	}
}

func unknownBytes(m protoreflect.Message) int {
	n := len(m.GetUnknown())
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap() || field.Kind() != protoreflect.MessageKind:
		case field.IsList():
			for i := range value.List().Len() {
				n += unknownBytes(value.List().Get(i).Message())
			}
		default:
			n += unknownBytes(value.Message())
		}
		return true
	})
	return n
}

// numbers takes the same out of JSON that came over HTTP.
var numbers = []struct {
	pattern *regexp.Regexp
	to      string
}{
	{regexp.MustCompile(`("(?:cluster_id|member_id|ID|raft_term)":")\d+`), "${1}1"},
	{regexp.MustCompile(`("TTL":")\d+`), "${1}600"},
}
