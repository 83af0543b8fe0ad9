// Command driver tells one story to a kube-apiserver and prints what came of it, so that the transcripts of two
// API servers with different stores below them can be compared. It starts nothing: what is to happen to servers in the
// middle of a scenario it asks of kube.py, its parent.
//
// Every line of stdout says by its first character what it is: "=" a line of the transcript, in which names that servers
// choose, times and versions are replaced; "#" a note that may differ, such as a duration; "@" a request, which kube.py
// answers with a line on stdin.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/keyutil"
)

// patience is how long the driver waits for what has to come about.
const patience = 90 * time.Second

type driver struct {
	ctx     context.Context
	client  *kubernetes.Clientset
	dynamic dynamic.Interface
	in      *bufio.Scanner
	out     sync.Mutex
}

// failure ends a scenario.
type failure struct{ text string }

func fail(format string, args ...any) {
	panic(failure{fmt.Sprintf(format, args...)})
}

// must returns what a call that has to succeed returned.
func must[T any](value T, err error) T {
	if err != nil {
		fail("%s", describe(err))
	}
	return value
}

func (d *driver) line(kind, format string, args []any) {
	d.out.Lock()
	defer d.out.Unlock()
	for _, line := range strings.Split(strings.TrimRight(fmt.Sprintf(format, args...), "\n"), "\n") {
		fmt.Printf("%s %s\n", kind, line)
	}
}

// say adds to the transcript.
func (d *driver) say(format string, args ...any) { d.line("=", format, args) }

// note tells what is not compared.
func (d *driver) note(format string, args ...any) { d.line("#", format, args) }

// ask has kube.py do something to the servers, and returns once it is done.
func (d *driver) ask(request string) {
	d.line("@", "%s", []any{request})
	if !d.in.Scan() || d.in.Text() != "done" {
		fail("%s: %s", request, d.in.Text())
	}
}

// eventually waits until done says so.
func (d *driver) eventually(what string, done func() bool) time.Duration {
	begun := time.Now()
	for !done() {
		if time.Since(begun) > patience {
			fail("still not after %s: %s", patience, what)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return time.Since(begun)
}

var (
	uidPattern    = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	numberPattern = regexp.MustCompile(`(\d+\.){3}\d+|\d{2,}`)
)

// describe is an error as the API gives it, without the numbers and ids that differ from run to run.
func describe(err error) string {
	if err == nil {
		return "ok"
	}
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return fmt.Sprintf("error %T: %v", err, err)
	}
	s := status.Status()
	message := numberPattern.ReplaceAllString(uidPattern.ReplaceAllString(s.Message, "<uid>"), "<n>")
	return fmt.Sprintf("%d %s: %s", s.Code, s.Reason, message)
}

// plain is an object as JSON, without what differs from run to run.
func plain(object any) string {
	raw := must(json.Marshal(object))
	var value any
	if err := json.Unmarshal(raw, &value); err != nil {
		fail("%v", err)
	}
	blank(value)
	var out strings.Builder
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	must("", encoder.Encode(value))
	return uidPattern.ReplaceAllString(strings.TrimSpace(out.String()), "<uid>")
}

func blank(value any) {
	switch value := value.(type) {
	case map[string]any:
		for key, inner := range value {
			switch {
			case key == "resourceVersion" || key == "continue":
				value[key] = "<" + key + ">"
			case strings.HasSuffix(key, "Timestamp") || strings.HasSuffix(key, "Time") || key == "time":
				value[key] = "<time>"
			default:
				blank(inner)
			}
		}
	case []any:
		for _, inner := range value {
			blank(inner)
		}
	}
}

var kinds = map[string]schema.GroupVersionResource{
	"crds":    {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
	"leases":  {Group: "coordination.k8s.io", Version: "v1", Resource: "leases"},
	"widgets": {Group: "compat.example.com", Version: "v1", Resource: "widgets"},
}

// of is the collection of a resource, of the core group if kinds does not know it.
func (d *driver) of(resource, namespace string) dynamic.ResourceInterface {
	kind, known := kinds[resource]
	if !known {
		kind = schema.GroupVersionResource{Version: "v1", Resource: resource}
	}
	if namespace == "" {
		return d.dynamic.Resource(kind)
	}
	return d.dynamic.Resource(kind).Namespace(namespace)
}

// object reads an object from JSON.
func object(format string, args ...any) *unstructured.Unstructured {
	var result unstructured.Unstructured
	if err := result.UnmarshalJSON([]byte(fmt.Sprintf(format, args...))); err != nil {
		fail("%v", err)
	}
	return &result
}

func configMap(name, value string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": name},
		"data": map[string]any{"value": value},
	}}
}

// namespace makes a fresh one.
func (d *driver) namespace(name string) string {
	must(d.of("namespaces", "").Create(d.ctx, object(`{"apiVersion":"v1","kind":"Namespace","metadata":{"name":%q}}`, name),
		metav1.CreateOptions{}))
	return name
}

// get reads a path of the API server. It does not try again where the answer asks for that.
func (d *driver) get(path string) (string, error) {
	body, err := d.client.Discovery().RESTClient().Get().MaxRetries(0).RequestURI(path).DoRaw(d.ctx)
	return string(body), err
}

func (d *driver) run(name string, scenario func(*driver)) {
	begun := time.Now()
	d.say("## %s", name)
	defer func() {
		d.note("%s took %.1f s", name, time.Since(begun).Seconds())
		switch reason := recover().(type) {
		case nil:
		case failure:
			d.say("FAILED: %s", reason.text)
		default:
			panic(reason)
		}
	}()
	scenario(d)
}

func main() {
	server := flag.String("server", "", "URL of the API server")
	token := flag.String("token", "", "a token of somebody who may do everything")
	key := flag.String("key", "", "write a fresh private key to this file, and end")
	flag.Parse()
	if *key != "" {
		pem, err := keyutil.MakeEllipticPrivateKeyPEM()
		if err == nil {
			err = os.WriteFile(*key, pem, 0o600)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		return
	}
	// The API server signs its certificate itself.
	config := &rest.Config{Host: *server, BearerToken: *token, QPS: -1, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	config.ContentType = runtime.ContentTypeJSON
	d := &driver{ctx: context.Background(), in: bufio.NewScanner(os.Stdin)}
	d.client = kubernetes.NewForConfigOrDie(config)
	d.dynamic = dynamic.NewForConfigOrDie(config)
	for _, name := range flag.Args() {
		scenario, known := scenarios[name]
		if !known {
			fmt.Fprintf(os.Stderr, "no scenario %q\n", name)
			os.Exit(2)
		}
		d.run(name, scenario)
	}
}
