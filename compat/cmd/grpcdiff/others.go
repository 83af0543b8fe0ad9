package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	electionpb "go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	lockpb "go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
)

func init() {
	register(group{name: "status", about: "Status, MemberList, gRPC health", run: statuses})
	register(group{name: "metadata", about: "hasleader, client-api-version, tokens", run: metadatas})
	register(group{name: "grpc-errors", about: "unknown services and methods, damaged messages", run: grpcErrors})
	register(group{name: "http", about: "/version, /health, /livez, /readyz and what is not there", run: https})
	register(group{name: "alarms", about: "Alarm: what endpoint health and kube-apiserver ask", run: alarms})
	register(group{name: "alarm-changes", about: "Alarm: raising and lowering, and what is refused meanwhile", later: true, run: alarmChanges})
	register(group{name: "hash", about: "HashKV", later: true, run: hashes})
	register(group{name: "maintenance", about: "Defragment, Snapshot, MoveLeader, Downgrade", later: true, run: maintenances})
	register(group{name: "members", about: "membership changes", later: true, run: members})
	register(group{name: "auth", about: "users, roles and permissions", run: auths})
	register(group{name: "lock", about: "the services of locks and elections", later: true, run: locks})
	register(group{name: "gateway", about: "the JSON gateway", later: true, run: gateway})
}

func statuses(t *session) {
	call(t, t.maint.Status, "Status", &pb.StatusRequest{})
	for _, linearizable := range []bool{false, true} {
		call(t, t.cluster.MemberList, "MemberList", &pb.MemberListRequest{Linearizable: linearizable})
	}
	t.set("a=1", "b=1")
	call(t, t.maint.Status, "Status", &pb.StatusRequest{})
	call(t, t.cluster.MemberList, "MemberList", &pb.MemberListRequest{Linearizable: true})
	health := healthpb.NewHealthClient(t.conn)
	call(t, health.Check, "grpc.health.v1 Check", &healthpb.HealthCheckRequest{})
	call(t, health.Check, "grpc.health.v1 Check", &healthpb.HealthCheckRequest{Service: "etcdserverpb.KV"})
	call(t, health.Check, "grpc.health.v1 Check", &healthpb.HealthCheckRequest{Service: "none"})
}

func metadatas(t *session) {
	for _, md := range []map[string]string{
		{"hasleader": "true"}, {"hasleader": "false"}, {"hasleader": ""}, {"hasleader": "x"},
		{"client-api-version": "3.7.0"}, {"client-api-version": "nonsense"}, {"client-api-version": ""},
		{"token": "nonsense"}, {"authorization": "nonsense"}, {"authorization": "Bearer nonsense"}, {"authorization": "Basic eDp5"},
		{"unknown-key": "v"},
	} {
		callWith(t, t.kv.Range, "Range", md, &pb.RangeRequest{Key: b("k")})
		callWith(t, t.kv.Put, "Put", md, &pb.PutRequest{Key: b("k")})
		callWith(t, t.cluster.MemberList, "MemberList", md, &pb.MemberListRequest{})
	}
}

// bytesCodec sends and receives messages as they are.
type bytesCodec struct{}

func (bytesCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = slices.Clone(data); return nil }
func (bytesCodec) Name() string                       { return "proto" }

var _ encoding.Codec = bytesCodec{}

// raw sends bytes to a method and records the error, or the reply decoded as into.
func (t *session) raw(method string, request []byte, into proto.Message) {
	ctx, cancel := context.WithTimeout(context.Background(), callMax)
	defer cancel()
	var reply []byte
	err := t.conn.Invoke(ctx, method, &request, &reply, grpc.ForceCodec(bytesCodec{}))
	text := ""
	switch {
	case err != nil:
		text = t.errorText(err)
	case into == nil:
		text = fmt.Sprintf("%d bytes", len(reply))
	default:
		text = t.answer(into, proto.Unmarshal(reply, into))
	}
	t.record(fmt.Sprintf("%s %x", method, request), text)
}

func grpcErrors(t *session) {
	t.raw("/etcdserverpb.KV/Nope", nil, nil)
	t.raw("/etcdserverpb.Nope/Range", nil, nil)
	t.raw("/nope/nope", nil, nil)
	t.raw("/etcdserverpb.kv/range", nil, nil)
	t.raw("/etcdserverpb.KV/", nil, nil)
	t.raw("/", nil, nil)
	const rangeMethod = "/etcdserverpb.KV/Range"
	good, err := proto.Marshal(&pb.RangeRequest{Key: b("a")})
	if err != nil {
		t.record("marshal", err.Error())
		return
	}
	t.raw(rangeMethod, good, &pb.RangeResponse{})
	t.raw(rangeMethod, nil, &pb.RangeResponse{})
	t.raw(rangeMethod, append(slices.Clone(good), 0xf8, 0x3f, 0x01), &pb.RangeResponse{})           // field 1023 = 1
	t.raw(rangeMethod, append(slices.Clone(good), 0xfa, 0x3f, 0x02, 'h', 'i'), &pb.RangeResponse{}) // field 1023 = "hi"
	t.raw(rangeMethod, append(slices.Clone(good), good...), &pb.RangeResponse{})
	// A range is read the same with its fields in another order.
	t.raw(rangeMethod, []byte{0x18, 0x01, 0x12, 0x01, 0x00, 0x0a, 0x01, 'a'}, &pb.RangeResponse{})
	// Booleans and enums beyond their range.
	t.raw(rangeMethod, []byte{0x0a, 0x01, 'a', 0x38, 0x07}, &pb.RangeResponse{})
	t.raw(rangeMethod, []byte{0x0a, 0x01, 'a', 0x28, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, &pb.RangeResponse{})
	// A txn's oneof given twice: the last one counts.
	t.raw("/etcdserverpb.KV/Txn", []byte{0x12, 0x0c, 0x12, 0x03, 0x0a, 0x01, 'a', 0x0a, 0x05, 0x0a, 0x01, 'b', 0x12, 0x00}, &pb.TxnResponse{})
	// Damaged messages are refused; the text after the code is the codec's own.
	damaged := [][]byte{{0x0a}, {0x0a, 0x05, 'a'}, {0xff}, {0x00}, {0x0b}, {0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}}
	try := func(bad []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), callMax)
		var reply []byte
		err := t.conn.Invoke(ctx, rangeMethod, &bad, &reply, grpc.ForceCodec(bytesCodec{}))
		cancel()
		code, _, _ := strings.Cut(t.errorText(err), ":")
		if err == nil {
			code = "OK"
		}
		t.record(fmt.Sprintf("%s %x", rangeMethod, bad), code)
	}
	for _, bad := range damaged {
		try(bad)
	}
	t.differs("a known field in a wrong wire type", func() { try([]byte{0x08, 0x01}) })
	// A call that comes with its deadline already over, and one that is given up.
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(context.Background(), metadata.MD{}), 0)
	_, err = t.kv.Range(ctx, &pb.RangeRequest{Key: b("a")})
	cancel()
	t.record("Range with its deadline over", t.errorText(err))
	// Compressed requests.
	t.record("Range compressed with an unknown method", t.compressed("nope"))
}

func (t *session) compressed(name string) string {
	req, err := http.NewRequest(http.MethodPost, t.url+"/etcdserverpb.KV/Range", strings.NewReader("\x00\x00\x00\x00\x00"))
	if err != nil {
		return err.Error()
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Grpc-Encoding", name)
	resp, err := t.http.Do(req)
	if err != nil {
		return "error"
	}
	defer resp.Body.Close()
	return fmt.Sprint("over HTTP/1.1: ", resp.StatusCode)
}

// fetch does one HTTP request and records status, type and body; the lines of a body with checks are sorted, for
// etcd lists them in no order.
func (t *session) fetch(method, path string, body string, headers ...string) {
	name := strings.TrimSpace(method + " " + path + " " + body + " " + strings.Join(headers, " "))
	req, err := http.NewRequest(method, t.url+path, strings.NewReader(body))
	if err != nil {
		t.record(name, "cannot be asked: "+err.Error())
		return
	}
	for _, h := range headers {
		key, value, _ := strings.Cut(h, ": ")
		req.Header.Set(key, value)
	}
	resp, err := t.http.Do(req)
	if err != nil {
		t.record(name, "error: "+t.clean.plain(err.Error()))
		return
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.record(name, "error: "+t.clean.plain(err.Error()))
		return
	}
	text := t.clean.plain(string(content))
	if strings.Contains(path, "livez") || strings.Contains(path, "readyz") {
		lines := strings.SplitAfter(text, "\n")
		slices.Sort(lines)
		text = strings.Join(lines, "")
	}
	if strings.HasPrefix(path, "/metrics") || strings.HasPrefix(path, "/debug") {
		text = "(not compared)"
	}
	for _, n := range numbers {
		text = n.pattern.ReplaceAllString(text, n.to)
	}
	t.record(name, fmt.Sprintf("%d, %s, allow %q, nosniff %q: %q", resp.StatusCode, resp.Header.Get("Content-Type"),
		resp.Header.Get("Allow"), resp.Header.Get("X-Content-Type-Options"), text))
}

func https(t *session) {
	for _, path := range []string{"/version", "/version/", "/version?x=1", "/health", "/health/", "/livez", "/livez/", "/readyz", "/readyz/"} {
		for _, method := range []string{"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"} {
			t.fetch(method, path, "")
		}
	}
	for _, path := range []string{
		"/health?serializable=true", "/health?serializable=false", "/health?serializable=x", "/health?exclude=NOSPACE",
		"/health?exclude=NOSPACE&exclude=CORRUPT", "/health?exclude=nonsense", "/health?exclude=", "/health?unknown=1",
		"/livez?verbose", "/livez?verbose=true", "/livez?verbose=false", "/livez?exclude=serializable_read",
		"/livez?exclude=serializable_read&verbose", "/livez?exclude=nonsense", "/livez?exclude=nonsense&verbose",
		"/livez/serializable_read", "/livez/serializable_read?verbose", "/livez/linearizable_read", "/livez/nonsense", "/livez/data_corruption",
		"/readyz?verbose", "/readyz?exclude=linearizable_read&verbose", "/readyz?exclude=linearizable_read&exclude=serializable_read&exclude=data_corruption&exclude=non_learner&verbose",
		"/readyz/data_corruption", "/readyz/serializable_read", "/readyz/linearizable_read", "/readyz/non_learner", "/readyz/non_learner?verbose",
		"/readyz/linearizable_read?exclude=linearizable_read", "/readyz/nonsense",
		"/", "/nonsense", "/v2/keys", "/v2/keys/a", "/v2/members", "/metrics", "/metrics/", "/debug/vars", "/debug/pprof/", "/debug/requests",
		"//version", "/Version", "/health/../version", "/%76ersion",
	} {
		t.fetch("GET", path, "")
	}
	t.fetch("POST", "/metrics", "")
	t.fetch("GET", "/version", "", "Host: example.com", "Origin: http://example.com")
	t.fetch("OPTIONS", "/version", "", "Origin: http://example.com", "Access-Control-Request-Method: GET")
}

var alarmTypes = []pb.AlarmType{pb.AlarmType_NONE, pb.AlarmType_NOSPACE, pb.AlarmType_CORRUPT}

func alarms(t *session) {
	for _, alarm := range alarmTypes {
		call(t, t.maint.Alarm, "Alarm", &pb.AlarmRequest{Action: pb.AlarmRequest_GET, Alarm: alarm})
	}
}

func alarmChanges(t *session) {
	alarm := func(action pb.AlarmRequest_AlarmAction, alarm pb.AlarmType) {
		call(t, t.maint.Alarm, "Alarm", &pb.AlarmRequest{Action: action, Alarm: alarm})
	}
	for _, a := range append(alarmTypes, 9) {
		alarm(pb.AlarmRequest_DEACTIVATE, a)
	}
	for _, a := range alarmTypes {
		alarm(pb.AlarmRequest_ACTIVATE, a)
		alarm(pb.AlarmRequest_GET, pb.AlarmType_NONE)
		// What is refused while it is on.
		t.put(&pb.PutRequest{Key: b("k"), Value: b("v")})
		t.get(&pb.RangeRequest{Key: b("k")})
		t.txn(success(opPut("k", "w")))
		t.txn(success(opDel("k", "")))
		t.txn(success(opGet("k", "")))
		t.del(&pb.DeleteRangeRequest{Key: b("k")})
		t.grant(0x20+int64(a), 600)
		t.fetch("GET", "/health", "")
		t.fetch("GET", "/health?exclude=NOSPACE", "")
		t.fetch("GET", "/readyz?verbose", "")
		alarm(pb.AlarmRequest_DEACTIVATE, a)
		alarm(pb.AlarmRequest_DEACTIVATE, a)
	}
	t.put(&pb.PutRequest{Key: b("k"), Value: b("v")})
}

func hashes(t *session) {
	hash := func(revision int64) {
		call(t, t.maint.HashKV, "HashKV", &pb.HashKVRequest{Revision: revision})
	}
	hash(0)
	t.set("a=1", "b=1", "a=2")
	hash(0)
	t.del(&pb.DeleteRangeRequest{Key: b("b")})
	t.txn(success(opPut("c", "1"), opPut("d", "1"), opDel("a", "")))
	t.grant(3, 600)
	t.put(&pb.PutRequest{Key: b("e"), Value: b("v"), Lease: 3})
	for revision := int64(-1); revision <= 9; revision++ {
		hash(revision)
	}
	t.compact(5)
	for revision := int64(0); revision <= 9; revision++ {
		hash(revision)
	}
	t.compact(6)
	t.set("f=1")
	for revision := int64(0); revision <= 9; revision++ {
		hash(revision)
	}
}

func maintenances(t *session) {
	t.set("a=1")
	call(t, t.maint.Defragment, "Defragment", &pb.DefragmentRequest{})
	call(t, t.maint.MoveLeader, "MoveLeader", &pb.MoveLeaderRequest{TargetID: 1})
	call(t, t.maint.MoveLeader, "MoveLeader", &pb.MoveLeaderRequest{})
	for _, action := range []pb.DowngradeRequest_DowngradeAction{0, 1, 2, 7} {
		for _, version := range []string{"", "nonsense", "3.5.0", "3.6.0", "3.6", "3.7.0", "3.8.0", "4.0.0"} {
			if action == pb.DowngradeRequest_ENABLE && strings.HasPrefix(version, "3.6") {
				continue
			}
			call(t, t.maint.Downgrade, "Downgrade", &pb.DowngradeRequest{Action: action, Version: version})
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), callMax)
	defer cancel()
	s, err := t.maint.Snapshot(ctx, &pb.SnapshotRequest{})
	if err != nil {
		t.record("Snapshot", t.errorText(err))
		return
	}
	total, last := 0, uint64(0)
	for {
		m, err := s.Recv()
		if err != nil {
			t.record("Snapshot: end", t.errorText(err))
			break
		}
		total += len(m.Blob)
		last = m.RemainingBytes
		t.record("Snapshot: version", m.Version)
		if m.Header != nil {
			t.record("Snapshot: header", t.clean.text(m.Header))
		}
		if total > 64<<20 {
			break
		}
		// Their number depends on the size of the file.
		t.records = t.records[:len(t.records)-1]
	}
	t.record("Snapshot: size mod 512, remaining at the end", fmt.Sprint(total%512, last))
}

func members(t *session) {
	for _, urls := range [][]string{nil, {""}, {"nonsense"}, {"http://127.0.0.1:2380"}, {"http://127.0.0.1"}, {"ftp://127.0.0.1:1"}, {"http://127.0.0.1:7/path"}} {
		for _, learner := range []bool{false, true} {
			call(t, t.cluster.MemberAdd, "MemberAdd", &pb.MemberAddRequest{PeerURLs: urls, IsLearner: learner})
			call(t, t.cluster.MemberUpdate, "MemberUpdate", &pb.MemberUpdateRequest{ID: 5, PeerURLs: urls})
		}
	}
	call(t, t.cluster.MemberRemove, "MemberRemove", &pb.MemberRemoveRequest{ID: 5})
	call(t, t.cluster.MemberRemove, "MemberRemove", &pb.MemberRemoveRequest{})
	call(t, t.cluster.MemberPromote, "MemberPromote", &pb.MemberPromoteRequest{ID: 5})
	add, _ := call(t, t.cluster.MemberAdd, "MemberAdd", &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:9"}, IsLearner: true})
	call(t, t.cluster.MemberAdd, "MemberAdd", &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:10"}, IsLearner: true})
	call(t, t.cluster.MemberList, "MemberList", &pb.MemberListRequest{Linearizable: true})
	if add != nil {
		id := add.Member.ID
		resp, err := t.cluster.MemberPromote(context.Background(), &pb.MemberPromoteRequest{ID: id})
		t.record("MemberPromote of the learner", t.answer(resp, err))
		removed, err := t.cluster.MemberRemove(context.Background(), &pb.MemberRemoveRequest{ID: id})
		t.record("MemberRemove of the learner", t.answer(removed, err))
	}
	call(t, t.cluster.MemberList, "MemberList", &pb.MemberListRequest{Linearizable: true})
}

func auths(t *session) {
	a := t.auth
	call(t, a.AuthStatus, "AuthStatus", &pb.AuthStatusRequest{})
	call(t, a.AuthEnable, "AuthEnable", &pb.AuthEnableRequest{})
	call(t, a.AuthDisable, "AuthDisable", &pb.AuthDisableRequest{})
	call(t, a.Authenticate, "Authenticate", &pb.AuthenticateRequest{Name: "root", Password: "r"})
	for _, r := range []*pb.AuthUserAddRequest{
		{}, {Name: "root", Password: "r"}, {Name: "root", Password: "r"}, {Name: "alice", Password: "a"},
		{Name: "nopw", Options: nil}, {Name: "empty", Password: ""},
	} {
		call(t, a.UserAdd, "UserAdd", r)
	}
	for _, name := range []string{"", "reader", "reader", "root"} {
		call(t, a.RoleAdd, "RoleAdd", &pb.AuthRoleAddRequest{Name: name})
	}
	call(t, a.AuthEnable, "AuthEnable", &pb.AuthEnableRequest{})
	call(t, a.RoleList, "RoleList", &pb.AuthRoleListRequest{})
	call(t, a.UserList, "UserList", &pb.AuthUserListRequest{})
	call(t, a.UserGrantRole, "UserGrantRole", &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"})
	call(t, a.UserGrantRole, "UserGrantRole", &pb.AuthUserGrantRoleRequest{User: "alice", Role: "reader"})
	call(t, a.UserGrantRole, "UserGrantRole", &pb.AuthUserGrantRoleRequest{User: "alice", Role: "none"})
	call(t, a.UserGrantRole, "UserGrantRole", &pb.AuthUserGrantRoleRequest{User: "none", Role: "reader"})
	call(t, a.RoleGrantPermission, "RoleGrantPermission", &pb.AuthRoleGrantPermissionRequest{Name: "reader"})
	call(t, a.RoleGet, "RoleGet", &pb.AuthRoleGetRequest{Role: "root"})
	call(t, a.RoleGet, "RoleGet", &pb.AuthRoleGetRequest{Role: "reader"})
	call(t, a.RoleGet, "RoleGet", &pb.AuthRoleGetRequest{Role: "none"})
	call(t, a.UserGet, "UserGet", &pb.AuthUserGetRequest{Name: "alice"})
	call(t, a.UserGet, "UserGet", &pb.AuthUserGetRequest{Name: "none"})
	call(t, a.AuthStatus, "AuthStatus", &pb.AuthStatusRequest{})
	call(t, a.AuthEnable, "AuthEnable", &pb.AuthEnableRequest{})
	t.get(&pb.RangeRequest{Key: b("a")})
	call(t, a.Authenticate, "Authenticate", &pb.AuthenticateRequest{Name: "alice", Password: "x"})
	call(t, a.Authenticate, "Authenticate", &pb.AuthenticateRequest{Name: "none", Password: "x"})
	resp, err := a.Authenticate(context.Background(), &pb.AuthenticateRequest{Name: "root", Password: "r"})
	if err != nil {
		t.record("Authenticate root", t.errorText(err))
		return
	}
	t.record("Authenticate root", t.clean.text(resp.Header))
	root := map[string]string{"token": resp.Token}
	ctx := metadata.NewOutgoingContext(context.Background(), metadata.New(root))
	r, err := t.kv.Range(ctx, &pb.RangeRequest{Key: b("a")})
	t.record("Range as root", t.answer(r, err))
	d, err := a.AuthDisable(ctx, &pb.AuthDisableRequest{})
	t.record("AuthDisable as root", t.answer(d, err))
	t.get(&pb.RangeRequest{Key: b("a")})
}

func locks(t *session) {
	lock := lockpb.NewLockClient(t.conn)
	t.grant(0x10, 600)
	call(t, lock.Lock, "Lock", &lockpb.LockRequest{Name: b("n"), Lease: 0x10})
	call(t, lock.Lock, "Lock", &lockpb.LockRequest{Name: b("n"), Lease: 99})
	t.all()
	call(t, lock.Unlock, "Unlock", &lockpb.UnlockRequest{Key: b("n/10")})
	call(t, lock.Unlock, "Unlock", &lockpb.UnlockRequest{Key: b("n/10")})
	t.all()
	election := electionpb.NewElectionClient(t.conn)
	name := &electionpb.LeaderRequest{Name: b("e")}
	call(t, election.Leader, "Leader", name)
	campaign := &electionpb.CampaignRequest{Name: b("e"), Lease: 0x10, Value: b("1")}
	call(t, election.Campaign, "Campaign", campaign)
	call(t, election.Leader, "Leader", name)
	for _, rev := range []int64{4, 5, 6, 7} {
		leader := &electionpb.LeaderKey{Name: b("e"), Key: b("e/10"), Rev: rev, Lease: 0x10}
		call(t, election.Proclaim, "Proclaim", &electionpb.ProclaimRequest{Leader: leader, Value: b("2")})
	}
	t.all()
	for _, rev := range []int64{4, 5, 6, 7} {
		leader := &electionpb.LeaderKey{Name: b("e"), Key: b("e/10"), Rev: rev, Lease: 0x10}
		call(t, election.Resign, "Resign", &electionpb.ResignRequest{Leader: leader})
	}
	call(t, election.Leader, "Leader", name)
	t.all()
	call(t, lock.Lock, "Lock", &lockpb.LockRequest{Name: b("n"), Lease: 0x10})
	t.differs("a lease that is in line already", func() {
		call(t, lock.Lock, "Lock", &lockpb.LockRequest{Name: b("n"), Lease: 0x10})
	})
}

func gateway(t *session) {
	for _, c := range [][2]string{
		{"/v3/kv/put", `{"key":"Zm9v","value":"YmFy"}`},
		{"/v3/kv/put", `{"key":"Zm9v","value":"YmFy","prev_kv":true}`},
		{"/v3/kv/put", `{"key":"Zm9v","value":"YmFy","prevKv":true}`},
		{"/v3/kv/put", `{}`}, {"/v3/kv/put", ``}, {"/v3/kv/put", `nonsense`}, {"/v3/kv/put", `{"key":"%"}`},
		{"/v3/kv/put", `{"key":"Zm9v","unknown":1}`}, {"/v3/kv/put", `{"key":"Zm9v","lease":"12"}`}, {"/v3/kv/put", `{"key":"Zm9v","lease":12}`},
		{"/v3/kv/range", `{"key":"Zm9v"}`}, {"/v3/kv/range", `{"key":"AA==","range_end":"AA=="}`},
		{"/v3/kv/range", `{"key":"Zm9v","sort_order":"DESCEND","sort_target":"MOD"}`}, {"/v3/kv/range", `{"key":"Zm9v","sort_order":2}`},
		{"/v3/kv/range", `{"key":"Zm9v","sort_order":"NOPE"}`}, {"/v3/kv/range", `{"key":"Zm9v","revision":"100"}`}, {"/v3/kv/range", `{"key":"Zm9v","count_only":true}`},
		{"/v3/kv/deleterange", `{"key":"bm9uZQ=="}`},
		{"/v3/kv/txn", `{"compare":[{"target":"VERSION","key":"Zm9v","version":"1"}],"success":[{"request_put":{"key":"YQ==","value":"YQ=="}}],"failure":[{"request_range":{"key":"Zm9v"}}]}`},
		{"/v3/kv/compaction", `{"revision":"100"}`}, {"/v3/kv/compaction", `{"revision":"2"}`},
		{"/v3/lease/grant", `{"TTL":600,"ID":123}`}, {"/v3/lease/grant", `{"TTL":"600","ID":"123"}`}, {"/v3/lease/timetolive", `{"ID":999}`},
		{"/v3/lease/leases", `{}`}, {"/v3/lease/revoke", `{"ID":123}`}, {"/v3/kv/lease/revoke", `{"ID":123}`}, {"/v3/lease/keepalive", `{"ID":5}`},
		{"/v3/cluster/member/list", `{}`}, {"/v3/maintenance/alarm", `{}`}, {"/v3/auth/status", `{}`},
		{"/v3beta/kv/range", `{"key":"Zm9v"}`}, {"/v3alpha/kv/range", `{"key":"Zm9v"}`}, {"/v3/kv/nope", `{}`},
	} {
		t.fetch("POST", c[0], c[1])
	}
	t.fetch("GET", "/v3/kv/range", "")
}
