package main

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"testing"
)

// What Go takes for a log entry as the system before this one made it, and for the same as JSON: the rows beside those
// of `cargo bench --workspace --bench tiers`, for a put of the same size. `go test -bench . ./cmd/gobgolden`.

var put = kv{"/registry/things/default/thing-00000007", long(256)}

func decodeGob(data []byte) (kv, error) {
	var got kv
	err := gob.NewDecoder(bytes.NewReader(data)).Decode(&got)
	return got, err
}

func decodeJSON(data []byte) (kv, error) {
	var got kv
	err := json.Unmarshal(data, &got)
	return got, err
}

func benchmarkDecode(b *testing.B, data []byte, decode func([]byte) (kv, error)) {
	b.ReportMetric(float64(len(data)), "bytes")
	b.ReportAllocs()
	for b.Loop() {
		if got, err := decode(data); err != nil || got != put {
			b.Fatal(got, err)
		}
	}
}

func BenchmarkEncodeGob(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		encode(put)
	}
}

func BenchmarkDecodeGob(b *testing.B) { benchmarkDecode(b, encode(put), decodeGob) }

func BenchmarkEncodeJSON(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := json.Marshal(put); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeJSON(b *testing.B) {
	data, err := json.Marshal(put)
	if err != nil {
		b.Fatal(err)
	}
	benchmarkDecode(b, data, decodeJSON)
}
