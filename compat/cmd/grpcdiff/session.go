package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	callMax = 10 * time.Second
	// A stream is quiet when nothing came for this long.
	quietFor = 500 * time.Millisecond
)

// meant says why the answer may be another one, if it may: these differences are listed in README.md.
type record struct{ request, answer, meant string }

// session is one server's side of the comparison: its clients, and what was asked and answered so far.
type session struct {
	label, url string
	conn       *grpc.ClientConn
	kv         pb.KVClient
	watch      pb.WatchClient
	lease      pb.LeaseClient
	cluster    pb.ClusterClient
	maint      pb.MaintenanceClient
	auth       pb.AuthClient
	http       *http.Client
	records    []record
	clean      *cleaner
	meant      string
}

func newSession(label, url string, exactIDs bool) (*session, error) {
	address := strings.TrimSuffix(url[strings.Index(url, "://")+len("://"):], "/")
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30)))
	if err != nil {
		return nil, err
	}
	return &session{
		label: label, url: strings.TrimSuffix(url, "/"), conn: conn,
		kv: pb.NewKVClient(conn), watch: pb.NewWatchClient(conn), lease: pb.NewLeaseClient(conn),
		cluster: pb.NewClusterClient(conn), maint: pb.NewMaintenanceClient(conn), auth: pb.NewAuthClient(conn),
		http:  &http.Client{Timeout: callMax},
		clean: &cleaner{exactIDs: exactIDs, address: address, leases: map[int64]int64{}},
	}, nil
}

func (t *session) close() { t.conn.Close() }

func (t *session) record(request, answer string) {
	t.records = append(t.records, record{request, answer, t.meant})
}

// differs lets what f records differ, for a reason.
func (t *session) differs(reason string, f func()) {
	t.meant = reason
	f()
	t.meant = ""
}

// answer is a reply or an error as text, without what may differ between servers that behave alike.
func (t *session) answer(m proto.Message, err error) string {
	if err != nil {
		return t.errorText(err)
	}
	return t.clean.text(m)
}

func (t *session) errorText(err error) string {
	if errors.Is(err, io.EOF) {
		return "end of stream"
	}
	s, ok := status.FromError(err)
	if !ok {
		return "error: " + t.clean.plain(err.Error())
	}
	text := fmt.Sprintf("%s: %s", s.Code(), t.clean.plain(s.Message()))
	if n := len(s.Details()); n > 0 {
		text += fmt.Sprintf(" (%d details)", n)
	}
	return text
}

// call does one unary request and records it.
func call[Req, Resp proto.Message](t *session, f func(context.Context, Req, ...grpc.CallOption) (Resp, error), name string, req Req) (Resp, error) {
	return callWith(t, f, name, nil, req)
}

func callWith[Req, Resp proto.Message](t *session, f func(context.Context, Req, ...grpc.CallOption) (Resp, error), name string, md map[string]string, req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callMax)
	defer cancel()
	if md != nil {
		ctx = metadata.NewOutgoingContext(ctx, metadata.New(md))
		name += fmt.Sprint(" ", md)
	}
	resp, err := f(ctx, req)
	t.record(name+" "+t.clean.text(req), t.answer(resp, err))
	return resp, err
}

func (t *session) get(r *pb.RangeRequest) *pb.RangeResponse {
	resp, _ := call(t, t.kv.Range, "Range", r)
	return resp
}

func (t *session) put(r *pb.PutRequest) *pb.PutResponse {
	resp, _ := call(t, t.kv.Put, "Put", r)
	return resp
}

func (t *session) del(r *pb.DeleteRangeRequest) { call(t, t.kv.DeleteRange, "DeleteRange", r) }

func (t *session) txn(r *pb.TxnRequest) *pb.TxnResponse {
	resp, _ := call(t, t.kv.Txn, "Txn", r)
	return resp
}

func (t *session) compact(revision int64) {
	call(t, t.kv.Compact, "Compact", &pb.CompactionRequest{Revision: revision, Physical: true})
}

func (t *session) grant(id, ttl int64) *pb.LeaseGrantResponse {
	resp, _ := call(t, t.lease.LeaseGrant, "LeaseGrant", &pb.LeaseGrantRequest{ID: id, TTL: ttl})
	return resp
}

func (t *session) revoke(id int64) {
	call(t, t.lease.LeaseRevoke, "LeaseRevoke", &pb.LeaseRevokeRequest{ID: id})
}

func (t *session) ttl(id int64, keys bool) {
	call(t, t.lease.LeaseTimeToLive, "LeaseTimeToLive", &pb.LeaseTimeToLiveRequest{ID: id, Keys: keys})
}

// set puts key=value pairs, one revision each.
func (t *session) set(pairs ...string) {
	for _, p := range pairs {
		key, value, _ := strings.Cut(p, "=")
		t.put(&pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	}
}

// fill puts count keys of one prefix, 100 to a transaction, and records only the last answer.
func (t *session) fill(prefix string, count int, value []byte) {
	for first := 0; first < count; first += 100 {
		r := &pb.TxnRequest{}
		for i := first; i < min(first+100, count); i++ {
			r.Success = append(r.Success, opPut(fmt.Sprintf("%s%05d", prefix, i), string(value)))
		}
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		resp, err := t.kv.Txn(ctx, r)
		cancel()
		if err != nil || first+100 >= count {
			t.record(fmt.Sprintf("fill %s with %d keys", prefix, count), t.answer(resp, err))
		}
		if err != nil {
			return
		}
	}
}

// all is what every group may end with: the whole store.
func (t *session) all() { t.get(&pb.RangeRequest{Key: zero, RangeEnd: zero}) }

// --- short names for requests -----------------------------------------------------------------------------------

var zero = []byte{0}

func b(s string) []byte { return []byte(s) }

func opPut(key, value string) *pb.RequestOp {
	return opPutRequest(&pb.PutRequest{Key: b(key), Value: b(value)})
}

func opPutRequest(r *pb.PutRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: r}}
}

func opGet(key, end string) *pb.RequestOp {
	return opGetRequest(&pb.RangeRequest{Key: b(key), RangeEnd: b(end)})
}

func opGetRequest(r *pb.RangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
}

func opDel(key, end string) *pb.RequestOp {
	return opDelRequest(&pb.DeleteRangeRequest{Key: b(key), RangeEnd: b(end)})
}

func opDelRequest(r *pb.DeleteRangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: r}}
}

func opTxn(r *pb.TxnRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: r}}
}

func ops(o ...*pb.RequestOp) []*pb.RequestOp { return o }

func success(o ...*pb.RequestOp) *pb.TxnRequest { return &pb.TxnRequest{Success: o} }

// never is a compare that fails: no key has a negative version.
func never() []*pb.Compare { return []*pb.Compare{cmpVersion("k", pb.Compare_EQUAL, -1)} }

func cmpVersion(key string, result pb.Compare_CompareResult, version int64) *pb.Compare {
	return &pb.Compare{Key: b(key), Result: result, Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: version}}
}

func cmpValue(key string, result pb.Compare_CompareResult, value string) *pb.Compare {
	return &pb.Compare{Key: b(key), Result: result, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: b(value)}}
}

// hashOf is a short name for a long answer.
func hashOf(s string) string { return fmt.Sprintf("%.8x", sha256.Sum256([]byte(s))) }

func compactJSON(in []byte) string {
	var out strings.Builder
	var v any
	d := json.NewDecoder(strings.NewReader(string(in)))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return string(in)
	}
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return string(in)
	}
	return strings.TrimSuffix(out.String(), "\n")
}
