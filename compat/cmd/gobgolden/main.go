// Command gobgolden writes the gob streams which the log-entry decoder must read, as golden files.
//
// The system before this one proposed `kv{Key, Val string}`, encoded by a fresh gob encoder, as the data of a Raft
// entry. These files are such data, made by encoding/gob itself. The output is the same at every run: gob numbers
// types in the order in which a process first meets them, and that order is fixed below.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"reflect"
	"strings"
)

// kv is the old system's type, name and fields included.
type kv struct {
	Key string
	Val string
}

// text is one string of a golden value: in full as base64 while short, by its length and hash when long.
type text struct {
	Base64 string `json:"base64,omitempty"`
	Len    int    `json:"len"`
	Sha256 string `json:"sha256"`
	// Repeat says how a long string is made: this unit, over and over, cut at Len bytes.
	Repeat string `json:"repeat,omitempty"`
}

type pair struct {
	Key text `json:"key"`
	Val text `json:"val"`
}

type entry struct {
	Name string `json:"name"`
	File string `json:"file"`
	// Type is the type's name inside the stream; it is empty for an unnamed struct.
	Type   string `json:"type"`
	Note   string `json:"note,omitempty"`
	Bytes  int    `json:"bytes"`
	Sha256 string `json:"sha256"`
	// Values are what the stream holds, in order; none for a stream which a decoder must refuse or pass over.
	Values []pair `json:"values"`
}

const (
	base64Max = 512
	unit      = "0123456789abcdef"
)

func long(n int) string { return strings.Repeat(unit, n/len(unit)+1)[:n] }

func describe(s string) text {
	sum := sha256.Sum256([]byte(s))
	t := text{Len: len(s), Sha256: hex.EncodeToString(sum[:])}
	if len(s) <= base64Max {
		t.Base64 = base64.StdEncoding.EncodeToString([]byte(s))
	}
	if len(s) >= len(unit) && s == long(len(s)) {
		t.Repeat = unit
	}
	return t
}

func encode(values ...any) []byte {
	var buf bytes.Buffer
	enc := gob.NewEncoder(&buf)
	for _, v := range values {
		if err := enc.Encode(v); err != nil {
			log.Fatal(err)
		}
	}
	return buf.Bytes()
}

func main() {
	dir := flag.String("out", "../crates/api/tests/golden/gob", "folder to write to, from the folder of go.mod")
	flag.Parse()
	if err := os.MkdirAll(*dir, 0o755); err != nil {
		log.Fatal(err)
	}

	var index []entry
	write := func(name, typeName, note string, data []byte, values ...kv) {
		e := entry{Name: name, File: name + ".bin", Type: typeName, Note: note, Bytes: len(data), Values: []pair{}}
		sum := sha256.Sum256(data)
		e.Sha256 = hex.EncodeToString(sum[:])
		for _, v := range values {
			e.Values = append(e.Values, pair{describe(v.Key), describe(v.Val)})
		}
		if err := os.WriteFile(filepath.Join(*dir, e.File), data, 0o644); err != nil {
			log.Fatal(err)
		}
		index = append(index, e)
	}

	cases := []struct {
		name string
		v    kv
	}{
		{"hello_world", kv{"hello", "world"}},
		{"empty", kv{"", ""}},
		{"key_only", kv{"k", ""}},
		{"val_only", kv{"", "v"}},
		{"val_127", kv{"k127", long(127)}},
		{"val_128", kv{"k128", long(128)}},
		{"val_300", kv{"k300", long(300)}},
		{"key_300", kv{long(300), "v300"}},
		{"val_70000", kv{"k70000", long(70000)}},
		{"utf8", kv{"ключ/鍵/🔑", "значение — 値 — é"}},
		{"binary", kv{"\x00\x01\xfe\xff", "\xff\x00\xc3\x28\x80"}},
		{"debian_stanza", kv{"/debian/zlib1g/1:1.2.13", "Package: zlib1g\nVersion: 1:1.2.13\n"}},
	}
	// The named type goes first, as in the old process, so that its number is the first one a user type gets.
	for _, c := range cases {
		write("kv_"+c.name, "kv", "", encode(c.v), c.v)
	}
	// A pointer to a struct is encoded as the struct.
	write("kv_pointer", "kv", "encoded from a pointer", encode(&kv{"hello", "world"}), kv{"hello", "world"})
	// One encoder, several values: the type is described once, before the first of them.
	write("kv_two_values", "kv", "two values of one encoder; the type is described once",
		encode(kv{"hello", "world"}, kv{"second", "value"}), kv{"hello", "world"}, kv{"second", "value"})
	// Two encoders one after another in one buffer: the type is described twice.
	write("kv_two_streams", "kv", "two fresh encoders' output joined; one decoder refuses the second description (gob: duplicate type received)",
		append(encode(kv{"a", "1"}), encode(kv{"b", "2"})...), kv{"a", "1"})

	type plain = struct {
		Key string
		Val string
	}
	for _, c := range cases {
		write("anon_"+c.name, "", "", encode(plain(c.v)), c.v)
	}

	// Streams of other shapes. Go's decoder matches fields by name, whatever their order or number.
	{
		type kv struct{ Val, Key string }
		write("kv_swapped_fields", "kv", "fields declared in the other order", encode(kv{"world", "hello"}),
			pairOf("hello", "world"))
	}
	{
		type kv struct {
			Key, Val string
			Extra    int
		}
		write("kv_extra_field", "kv", "one field more (Extra int = 7), which a decoder into kv ignores",
			encode(kv{"hello", "world", 7}), pairOf("hello", "world"))
	}
	// A type number above 127 takes one byte more in the stream. Every array length is a type of its own.
	for n := 1; n <= 100; n++ {
		_ = encode(reflect.New(reflect.ArrayOf(n, reflect.TypeFor[int]())).Interface())
	}
	{
		type kv struct{ Key, Val string }
		write("kv_large_type_id", "kv", "the type's number is above 127", encode(kv{"hello", "world"}), pairOf("hello", "world"))
	}

	// What is not a {Key, Val string}: a decoder must say so, not guess.
	whole := encode(kv{"hello", "world"})
	write("bad_truncated", "kv", "kv_hello_world without its last byte", whole[:len(whole)-1])
	write("bad_type_only", "kv", "the type's description without a value", whole[:1+int(whole[0])])
	{
		type kv struct{ Key, Val int }
		write("bad_int_fields", "kv", "fields of another type", encode(kv{1, 2}))
	}
	{
		type other struct{ Name, Text string }
		write("bad_other_fields", "other", "no field in common; Go: type mismatch, no fields matched", encode(other{"a", "b"}))
	}
	write("bad_string", "", "a bare string", encode("hello"))

	check(*dir, index)
	out, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(*dir, "index.json"), append(out, '\n'), 0o644); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d golden files in %s\n", len(index), *dir)
}

// pairOf makes a kv where an inner type of that name hides it.
func pairOf(key, val string) kv { return kv{key, val} }

// check decodes every file as the old system did and compares with what the index says.
func check(dir string, index []entry) {
	for _, e := range index {
		data, err := os.ReadFile(filepath.Join(dir, e.File))
		if err != nil {
			log.Fatal(err)
		}
		dec := gob.NewDecoder(bytes.NewReader(data))
		for i, want := range e.Values {
			var got kv
			if err := dec.Decode(&got); err != nil {
				log.Fatalf("%s: value %d: %v", e.Name, i, err)
			}
			if describe(got.Key) != want.Key || describe(got.Val) != want.Val {
				log.Fatalf("%s: value %d decodes to something else", e.Name, i)
			}
		}
		var rest kv
		if err := dec.Decode(&rest); err == nil {
			log.Fatalf("%s: more values than the index says", e.Name)
		}
	}
}
