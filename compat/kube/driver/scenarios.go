package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
)

var scenarios = map[string]func(*driver){
	"start":       start,
	"objects":     objects,
	"allocations": allocations,
	"apply":       apply,
	"lists":       lists,
	"watches":     watches,
	"deletions":   deletions,
	"custom":      custom,
	"expiry":      expiry,
	"ttl":         ttl,
	"conflicts":   conflicts,
	"election":    election,
	"sizes":       sizes,
	"load":        load,
	"restarts":    restarts,
	"members":     members,
	"metrics":     metrics,
}

// names lists what is there, sorted.
func (d *driver) names(in dynamic.ResourceInterface, options metav1.ListOptions) []string {
	var names []string
	for _, item := range must(in.List(d.ctx, options)).Items {
		name := item.GetName()
		if item.GetNamespace() != "" {
			name = item.GetNamespace() + "/" + name
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// start looks at what an API server puts into a new store, and what it says of its health.
func start(d *driver) {
	d.eventually("the namespaces of the system", func() bool {
		return len(d.names(d.of("namespaces", ""), metav1.ListOptions{})) == 4
	})
	d.eventually("the service of the API server", func() bool {
		_, err := d.of("services", "default").Get(d.ctx, "kubernetes", metav1.GetOptions{})
		return err == nil
	})
	for _, path := range []string{"/healthz?verbose", "/livez?verbose", "/readyz?verbose"} {
		body, err := d.get(path)
		d.say("%s: %s\n%s", path, describe(err), body)
	}
	_, lists, err := d.client.Discovery().ServerGroupsAndResources()
	if err != nil {
		fail("%v", err)
	}
	stored := discovery.FilteredBy(discovery.SupportsAllVerbs{Verbs: []string{"list", "create"}}, lists)
	slices.SortFunc(stored, func(a, b *metav1.APIResourceList) int { return strings.Compare(a.GroupVersion, b.GroupVersion) })
	for _, list := range stored {
		for _, resource := range list.APIResources {
			version := must(schema.ParseGroupVersion(list.GroupVersion))
			names := d.names(d.dynamic.Resource(version.WithResource(resource.Name)), metav1.ListOptions{})
			for i, name := range names {
				// Named after the host.
				if strings.HasPrefix(name, "kube-system/apiserver-") && resource.Name == "leases" {
					names[i] = "kube-system/apiserver-<host>"
				}
			}
			if resource.Name != "events" {
				d.say("%s %s: %d: %s", list.GroupVersion, resource.Name, len(names), strings.Join(names, " "))
			}
		}
	}
}

func objects(d *driver) {
	ns := d.namespace("objects")
	configs := d.of("configmaps", ns)
	created := must(configs.Create(d.ctx, configMap("a", "1"), metav1.CreateOptions{}))
	d.say("created %s", plain(created))
	_, err := configs.Create(d.ctx, configMap("a", "2"), metav1.CreateOptions{})
	d.say("created again: %s", describe(err))
	_, err = configs.Get(d.ctx, "nothing", metav1.GetOptions{})
	d.say("get of nothing: %s", describe(err))

	second := created.DeepCopy()
	must("", unstructured.SetNestedField(second.Object, "2", "data", "value"))
	updated := must(configs.Update(d.ctx, second, metav1.UpdateOptions{}))
	d.say("updated %s, version rose: %t", plain(updated), rose(created, updated))
	same := must(configs.Update(d.ctx, updated, metav1.UpdateOptions{}))
	d.say("updated with no change, same version: %t", same.GetResourceVersion() == updated.GetResourceVersion())
	must("", unstructured.SetNestedField(created.Object, "3", "data", "value"))
	_, err = configs.Update(d.ctx, created, metav1.UpdateOptions{})
	d.say("updated from an old version: %s", describe(err))

	patched := must(configs.Patch(d.ctx, "a", types.StrategicMergePatchType, []byte(`{"data":{"more":"x"}}`), metav1.PatchOptions{}))
	d.say("patched %s, version rose: %t", plain(patched), rose(updated, patched))
	patched = must(configs.Patch(d.ctx, "a", types.JSONPatchType, []byte(`[{"op":"remove","path":"/data/value"}]`), metav1.PatchOptions{}))
	d.say("patched %s", plain(patched))
	_, err = configs.Patch(d.ctx, "a", types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"resourceVersion":%q},"data":{"more":"y"}}`,
		updated.GetResourceVersion()), metav1.PatchOptions{})
	d.say("patched from an old version: %s", describe(err))

	wrong := types.UID("00000000-0000-0000-0000-000000000000")
	err = configs.Delete(d.ctx, "a", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &wrong}})
	d.say("deleted with another uid: %s", describe(err))
	old := updated.GetResourceVersion()
	err = configs.Delete(d.ctx, "a", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &old}})
	d.say("deleted at an old version: %s", describe(err))
	_, err = configs.Create(d.ctx, configMap("dry", "run"), metav1.CreateOptions{DryRun: []string{"All"}})
	d.say("created for show: %s; there is %v", describe(err), d.names(configs, metav1.ListOptions{}))
	d.say("deleted: %s", describe(configs.Delete(d.ctx, "a", metav1.DeleteOptions{})))
	d.say("deleted again: %s", describe(configs.Delete(d.ctx, "a", metav1.DeleteOptions{})))

	secret := must(d.of("secrets", ns).Create(d.ctx, object(
		`{"apiVersion":"v1","kind":"Secret","metadata":{"name":"s","annotations":{"a":"ü<&>"}},"data":{"k":"AAEC/w=="},"immutable":true}`), metav1.CreateOptions{}))
	d.say("created %s", plain(secret))
	must("", unstructured.SetNestedField(secret.Object, "AAAA", "data", "k"))
	_, err = d.of("secrets", ns).Update(d.ctx, secret, metav1.UpdateOptions{})
	d.say("updated what is immutable: %s", describe(err))

	pods := d.of("pods", ns)
	pod := must(pods.Create(d.ctx, object(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"c","image":"i"}]}}`),
		metav1.CreateOptions{}))
	d.say("created %s", plain(pod))
	_, err = pods.Create(d.ctx, object(`{"apiVersion":"v1","kind":"Binding","metadata":{"name":"p"},"target":{"kind":"Node","name":"n"}}`),
		metav1.CreateOptions{}, "binding")
	var unexpected *apierrors.UnexpectedObjectError
	if err != nil && !errors.As(err, &unexpected) {
		d.say("bound: %s", describe(err))
	}
	running := must(pods.Patch(d.ctx, "p", types.MergePatchType, []byte(`{"status":{"phase":"Running"}}`), metav1.PatchOptions{}, "status"))
	d.say("bound and running %s", plain(running))
	none := int64(0)
	d.say("deleted: %s", describe(pods.Delete(d.ctx, "p", metav1.DeleteOptions{GracePeriodSeconds: &none})))
	d.say("there is %v", d.names(pods, metav1.ListOptions{}))
}

func version(o metav1.Object) int64 {
	return must(strconv.ParseInt(o.GetResourceVersion(), 10, 64))
}

func rose(before, after metav1.Object) bool { return version(after) > version(before) }

// allocations makes services at once, each of which takes an address and a port out of bitmaps that are objects too.
func allocations(d *driver) {
	services := d.of("services", d.namespace("allocations"))
	const count = 40
	d.workers(8, count, func(i int) {
		must(services.Create(d.ctx, object(`{"apiVersion":"v1","kind":"Service","metadata":{"name":"s%02d"},"spec":{"type":"NodePort","ports":[{"port":80}]}}`, i),
			metav1.CreateOptions{}))
	})
	addresses, ports := map[string]bool{}, map[int64]bool{}
	for _, item := range must(services.List(d.ctx, metav1.ListOptions{})).Items {
		address, _, _ := unstructured.NestedString(item.Object, "spec", "clusterIP")
		list, _, _ := unstructured.NestedSlice(item.Object, "spec", "ports")
		addresses[address] = true
		ports[list[0].(map[string]any)["nodePort"].(int64)] = true
	}
	d.say("%d services have %d addresses and %d ports", count, len(addresses), len(ports))
	taken := slices.Sorted(maps.Keys(addresses))[0]
	same := object(`{"apiVersion":"v1","kind":"Service","metadata":{"name":"same"},"spec":{"clusterIP":%q,"ports":[{"port":80}]}}`, taken)
	_, err := services.Create(d.ctx, same, metav1.CreateOptions{})
	d.say("an address that is taken: %s", describe(err))
	d.workers(8, count, func(i int) { must("", services.Delete(d.ctx, fmt.Sprintf("s%02d", i), metav1.DeleteOptions{})) })
	must(services.Create(d.ctx, same, metav1.CreateOptions{}))
	d.say("the address is free again")
}

// workers does count jobs, so many at a time.
func (d *driver) workers(parallel, count int, job func(int)) {
	var next atomic.Int64
	var group sync.WaitGroup
	var first atomic.Pointer[failure]
	for range parallel {
		group.Go(func() {
			defer func() {
				if reason, ok := recover().(failure); ok {
					first.CompareAndSwap(nil, &reason)
				}
			}()
			for i := int(next.Add(1)) - 1; i < count; i = int(next.Add(1)) - 1 {
				job(i)
			}
		})
	}
	group.Wait()
	if reason := first.Load(); reason != nil {
		panic(*reason)
	}
}

func apply(d *driver) {
	configs := d.of("configmaps", d.namespace("apply"))
	one := must(configs.Apply(d.ctx, "a", configMap("a", "1"), metav1.ApplyOptions{FieldManager: "one"}))
	d.say("applied %s", plain(one))
	again := must(configs.Apply(d.ctx, "a", configMap("a", "1"), metav1.ApplyOptions{FieldManager: "one"}))
	d.say("applied again, same version: %t", again.GetResourceVersion() == one.GetResourceVersion())
	_, err := configs.Apply(d.ctx, "a", configMap("a", "2"), metav1.ApplyOptions{FieldManager: "two"})
	d.say("applied by another: %s", describe(err))
	two := must(configs.Apply(d.ctx, "a", configMap("a", "2"), metav1.ApplyOptions{FieldManager: "two", Force: true}))
	d.say("applied by force %s, version rose: %t", plain(two), rose(one, two))
}

// fill makes count config configs.
func (d *driver) fill(in dynamic.ResourceInterface, count, parallel int, value string) time.Duration {
	begun := time.Now()
	d.workers(parallel, count, func(i int) {
		item := configMap(fmt.Sprintf("c%05d", i), value)
		item.SetLabels(map[string]string{"third": strconv.Itoa(i % 3)})
		must(in.Create(d.ctx, item, metav1.CreateOptions{}))
	})
	return time.Since(begun)
}

// walk lists page by page.
func (d *driver) walk(in dynamic.ResourceInterface, options metav1.ListOptions) (items []unstructured.Unstructured, pages string, err error) {
	versions := map[string]bool{}
	for {
		list, err := in.List(d.ctx, options)
		if err != nil {
			return items, pages, err
		}
		items = append(items, list.Items...)
		versions[list.GetResourceVersion()] = true
		remaining := "unknown"
		if list.GetRemainingItemCount() != nil {
			remaining = strconv.FormatInt(*list.GetRemainingItemCount(), 10)
		}
		pages += fmt.Sprintf("%d+%s ", len(list.Items), remaining)
		if options.Continue = list.GetContinue(); options.Continue == "" {
			return items, fmt.Sprintf("%sat %d versions", pages, len(versions)), nil
		}
		options.ResourceVersion, options.ResourceVersionMatch = "", ""
	}
}

// check says whether the items are all different and how many there are.
func check(items []unstructured.Unstructured) string {
	seen := map[string]bool{}
	for _, item := range items {
		seen[item.GetName()] = true
	}
	sorted := slices.IsSortedFunc(items, func(a, b unstructured.Unstructured) int { return strings.Compare(a.GetName(), b.GetName()) })
	return fmt.Sprintf("%d items, %d names, sorted: %t", len(items), len(seen), sorted)
}

func lists(d *driver) {
	const count = 2500
	configs := d.of("configmaps", d.namespace("lists"))
	empty := must(configs.List(d.ctx, metav1.ListOptions{})).GetResourceVersion()
	d.fill(configs, count, 16, strings.Repeat("v", 300))
	d.say("watched from before: %v", d.onlookers(configs, empty, 1, count, nil))
	all := must(configs.List(d.ctx, metav1.ListOptions{}))
	d.say("all: %s", check(all.Items))
	before := all.GetResourceVersion()
	for _, options := range []metav1.ListOptions{
		{Limit: 500}, {Limit: 999}, {Limit: 2500}, {Limit: 400, LabelSelector: "third=1"}, {LabelSelector: "third in (0,2)"},
		{FieldSelector: "metadata.name=c00007"}, {Limit: 700, ResourceVersion: before, ResourceVersionMatch: metav1.ResourceVersionMatchExact},
		{Limit: 500, ResourceVersion: "0"}, {ResourceVersion: before}, {Limit: 1000, ResourceVersion: before, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan},
		{ResourceVersion: "0", ResourceVersionMatch: metav1.ResourceVersionMatchExact},
		{Limit: 10, Continue: "nonsense"},
	} {
		items, pages, err := d.walk(configs, options)
		if options.ResourceVersion == before {
			options.ResourceVersion = "before"
		}
		d.say("limit %d %s%s version %q %s: %s; %s; %s", options.Limit, options.LabelSelector, options.FieldSelector, options.ResourceVersion,
			options.ResourceVersionMatch, describe(err), check(items), pages)
	}

	// A list goes on as it began, whatever changes meanwhile; one at an exact version shows that time.
	first := must(configs.List(d.ctx, metav1.ListOptions{Limit: 1000}))
	d.workers(8, 100, func(i int) {
		must("", configs.Delete(d.ctx, fmt.Sprintf("c%05d", 2000+i), metav1.DeleteOptions{}))
		must(configs.Create(d.ctx, configMap(fmt.Sprintf("d%05d", i), ""), metav1.CreateOptions{}))
		must(configs.Patch(d.ctx, fmt.Sprintf("c%05d", 1500+i), types.MergePatchType, []byte(`{"data":{"value":"new"}}`), metav1.PatchOptions{}))
	})
	rest, pages, err := d.walk(configs, metav1.ListOptions{Limit: 1000, Continue: first.GetContinue()})
	d.say("continued: %s; %s; %s; %s", describe(err), check(append(first.Items, rest...)), pages, changed(rest))
	then := must(configs.List(d.ctx, metav1.ListOptions{ResourceVersion: before, ResourceVersionMatch: metav1.ResourceVersionMatchExact}))
	d.say("as it was: %s; %s; that version: %t", check(then.Items), changed(then.Items), then.GetResourceVersion() == before)
	now := must(configs.List(d.ctx, metav1.ListOptions{}))
	d.say("as it is: %s; %s; version rose: %t", check(now.Items), changed(now.Items), now.GetResourceVersion() > before)
	for _, path := range []string{"?resourceVersionMatch=Exact&", "?resourceVersionMatch=NotOlderThan&", "/c00001?"} {
		_, err := d.get("/api/v1/namespaces/lists/configmaps" + path + "resourceVersion=900000000")
		d.say("a version to come, %s: %s", path, describe(err))
	}
}

func changed(items []unstructured.Unstructured) string {
	count := 0
	for _, item := range items {
		if value, _, _ := unstructured.NestedString(item.Object, "data", "value"); value == "new" {
			count++
		}
	}
	return fmt.Sprintf("%d changed", count)
}

// events collects what a watch gives until it ends, or count of them have come.
func (d *driver) events(in dynamic.ResourceInterface, options metav1.ListOptions, count int, meanwhile func()) {
	seconds := int64(patience.Seconds())
	if options.TimeoutSeconds == nil {
		options.TimeoutSeconds = &seconds
	}
	watcher, err := in.Watch(d.ctx, options)
	if err != nil {
		d.say("  not watched: %s", describe(err))
		return
	}
	defer watcher.Stop()
	if meanwhile != nil {
		meanwhile()
	}
	last := int64(0)
	for event := range watcher.ResultChan() {
		if event.Type == watch.Error {
			d.say("  %s %s", event.Type, describe(apierrors.FromObject(event.Object)))
			return
		}
		item := event.Object.(*unstructured.Unstructured)
		value, _, _ := unstructured.NestedString(item.Object, "data", "value")
		marks := ""
		if item.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" {
			marks = ", initial events end"
		}
		d.say("  %s %s %s, version rose: %t%s", event.Type, item.GetName(), value, version(item) > last, marks)
		last = version(item)
		if count--; count == 0 {
			return
		}
	}
	d.say("  ended")
}

// onlookers counts, for each of so many watches, how many of count events come, all of rising version. It returns the
// different counts.
func (d *driver) onlookers(in dynamic.ResourceInterface, from string, watches, count int, meanwhile func()) []int {
	seen := make([]int, watches)
	var started, ended sync.WaitGroup
	started.Add(watches)
	for i := range watches {
		ended.Go(func() {
			watcher, err := in.Watch(d.ctx, metav1.ListOptions{ResourceVersion: from})
			started.Done()
			if err != nil {
				return
			}
			defer watcher.Stop()
			timeout := time.After(patience)
			for last := int64(0); seen[i] < count; seen[i]++ {
				select {
				case event := <-watcher.ResultChan():
					item, is := event.Object.(*unstructured.Unstructured)
					if !is || event.Type == watch.Error {
						return
					}
					at, err := strconv.ParseInt(item.GetResourceVersion(), 10, 64)
					if err != nil || at <= last {
						return
					}
					last = at
				case <-timeout:
					return
				}
			}
		})
	}
	started.Wait()
	if meanwhile != nil {
		meanwhile()
	}
	ended.Wait()
	slices.Sort(seen)
	return slices.Compact(seen)
}

func watches(d *driver) {
	configs := d.of("configmaps", d.namespace("watches"))
	before := must(configs.List(d.ctx, metav1.ListOptions{})).GetResourceVersion()
	labelled := func(name, value string) *unstructured.Unstructured {
		item := configMap(name, value)
		item.SetLabels(map[string]string{"l": value})
		return item
	}
	change := func(name, value string) {
		must(configs.Create(d.ctx, labelled(name, value), metav1.CreateOptions{}))
		must(configs.Update(d.ctx, labelled(name, "on"), metav1.UpdateOptions{}))
		must(configs.Update(d.ctx, labelled(name, "off"), metav1.UpdateOptions{}))
		must("", configs.Delete(d.ctx, name, metav1.DeleteOptions{}))
	}
	change("past", "off")
	must(configs.Create(d.ctx, labelled("stays", "on"), metav1.CreateOptions{}))
	d.say("from a version:")
	d.events(configs, metav1.ListOptions{ResourceVersion: before}, 9, func() { change("now", "off") })
	d.say("with a label:")
	d.events(configs, metav1.ListOptions{ResourceVersion: before, LabelSelector: "l=on"}, 7, func() { change("now", "off") })
	d.say("of one:")
	d.events(configs, metav1.ListOptions{ResourceVersion: before, FieldSelector: "metadata.name=stays"}, 1, nil)
	d.say("from any state:")
	d.events(configs, metav1.ListOptions{ResourceVersion: "0"}, 5, func() { change("now", "off") })
	d.say("from the newest state:")
	d.events(configs, metav1.ListOptions{}, 5, func() { change("now", "off") })
	d.say("a list that is watched:")
	yes := true
	d.events(configs, metav1.ListOptions{SendInitialEvents: &yes, AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan}, 6,
		func() { change("now", "off") })
	now := must(configs.List(d.ctx, metav1.ListOptions{})).GetResourceVersion()
	d.say("by 200 at once: %v", d.onlookers(configs, now, 200, 40, func() {
		for range 10 {
			change("now", "off")
		}
	}))
	d.say("from a version to come:")
	short := int64(4)
	d.events(configs, metav1.ListOptions{ResourceVersion: "900000000", TimeoutSeconds: &short}, 1, nil)
	d.say("bookmarks:")
	now = must(configs.List(d.ctx, metav1.ListOptions{})).GetResourceVersion()
	others := d.of("configmaps", "default")
	d.events(configs, metav1.ListOptions{ResourceVersion: now, AllowWatchBookmarks: true, TimeoutSeconds: &short}, 1, func() {
		must(others.Create(d.ctx, configMap("elsewhere", ""), metav1.CreateOptions{}))
		must("", others.Delete(d.ctx, "elsewhere", metav1.DeleteOptions{}))
	})
}

func deletions(d *driver) {
	ns := d.namespace("deletions")
	configs := d.of("configmaps", ns)
	d.fill(configs, 300, 16, "")
	err := configs.DeleteCollection(d.ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "third=2"})
	d.say("deleted a third: %s; left %d", describe(err), len(d.names(configs, metav1.ListOptions{})))
	err = configs.DeleteCollection(d.ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
	d.say("deleted all: %s; left %d", describe(err), len(d.names(configs, metav1.ListOptions{})))

	held := configMap("held", "")
	held.SetFinalizers([]string{"compat.example.com/hold"})
	must(configs.Create(d.ctx, held, metav1.CreateOptions{}))
	d.say("deleted with a finalizer: %s", describe(configs.Delete(d.ctx, "held", metav1.DeleteOptions{})))
	d.say("it is %s", plain(must(configs.Get(d.ctx, "held", metav1.GetOptions{}))))
	must(configs.Patch(d.ctx, "held", types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}))
	_, err = configs.Get(d.ctx, "held", metav1.GetOptions{})
	d.say("without it: %s", describe(err))
	// Nobody empties namespaces here: the controllers that do are not part of the API server.
	d.say("deleted the namespace: %s", describe(d.of("namespaces", "").Delete(d.ctx, ns, metav1.DeleteOptions{})))
	d.say("it is %s", plain(must(d.of("namespaces", "").Get(d.ctx, ns, metav1.GetOptions{}))))
	_, err = configs.Create(d.ctx, configMap("late", ""), metav1.CreateOptions{})
	d.say("created in it: %s", describe(err))
}

const widgets = `{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","metadata":{"name":"widgets.compat.example.com"},
"spec":{"group":"compat.example.com","scope":"Namespaced","names":{"plural":"widgets","singular":"widget","kind":"Widget"},
"versions":[{"name":"v1","served":true,"storage":true,"subresources":{"status":{}},"schema":{"openAPIV3Schema":{"type":"object",
"properties":{"data":{"type":"object","additionalProperties":{"type":"string"}},"status":{"type":"object","x-kubernetes-preserve-unknown-fields":true}}}}}]}}`

// define has the API server serve widgets.
func (d *driver) define() {
	_, err := d.of("crds", "").Create(d.ctx, object(widgets), metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		must("", err)
	}
	d.eventually("widgets are served", func() bool {
		_, err := d.of("widgets", "default").List(d.ctx, metav1.ListOptions{})
		return err == nil
	})
}

func widget(name, value string) *unstructured.Unstructured {
	item := configMap(name, value)
	item.SetAPIVersion("compat.example.com/v1")
	item.SetKind("Widget")
	return item
}

func custom(d *driver) {
	d.define()
	ns := d.namespace("custom")
	items := d.of("widgets", ns)
	before := must(items.List(d.ctx, metav1.ListOptions{})).GetResourceVersion()
	one := must(items.Create(d.ctx, widget("w", "1"), metav1.CreateOptions{}))
	d.say("created %s", plain(one))
	bad := widget("bad", "")
	bad.Object["data"] = "text"
	_, err := items.Create(d.ctx, bad, metav1.CreateOptions{})
	d.say("created a bad one: %s", describe(err))
	must("", unstructured.SetNestedField(one.Object, "2", "data", "value"))
	two := must(items.Update(d.ctx, one, metav1.UpdateOptions{}))
	must("", unstructured.SetNestedField(two.Object, "well", "status", "state"))
	three := must(items.UpdateStatus(d.ctx, two, metav1.UpdateOptions{}))
	d.say("with status %s", plain(three))
	_, err = items.Update(d.ctx, two, metav1.UpdateOptions{})
	d.say("updated from an old version: %s", describe(err))
	d.events(items, metav1.ListOptions{ResourceVersion: before}, 4, func() {
		must("", items.Delete(d.ctx, "w", metav1.DeleteOptions{}))
	})
	must(items.Create(d.ctx, widget("last", "1"), metav1.CreateOptions{}))
	must("", d.of("crds", "").Delete(d.ctx, "widgets.compat.example.com", metav1.DeleteOptions{}))
	d.eventually("the definition is gone", func() bool {
		_, err := d.of("crds", "").Get(d.ctx, "widgets.compat.example.com", metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	})
	d.define()
	d.say("of the widgets remain %v", d.names(items, metav1.ListOptions{}))
	must("", d.of("crds", "").Delete(d.ctx, "widgets.compat.example.com", metav1.DeleteOptions{}))
}

// expiry waits until history is compacted, by the API server or (compact) by the store itself.
func expiry(d *driver) {
	configs := d.of("configmaps", d.namespace("expiry"))
	d.fill(configs, 30, 1, "")
	first := must(configs.List(d.ctx, metav1.ListOptions{Limit: 10}))
	then := first.GetResourceVersion()
	d.workers(4, 10, func(i int) {
		must("", configs.Delete(d.ctx, fmt.Sprintf("c%05d", 20+i), metav1.DeleteOptions{}))
	})
	d.ask("compact")
	at := metav1.ListOptions{ResourceVersion: then, ResourceVersionMatch: metav1.ResourceVersionMatchExact}
	var err error
	took := d.eventually("a list of the past is refused", func() bool {
		_, err = configs.List(d.ctx, at)
		return err != nil
	})
	d.note("the past is gone after %.1f s", took.Seconds())
	d.say("list at an exact version: %s", describe(err))
	_, err = configs.List(d.ctx, metav1.ListOptions{Limit: 10, Continue: first.GetContinue()})
	d.say("continued: %s", describe(err))
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		rest := must(configs.List(d.ctx, metav1.ListOptions{Limit: 10, Continue: status.Status().Continue}))
		d.say("continued with what is there now: %s, version rose: %t", check(rest.Items), rest.GetResourceVersion() > then)
	}
	d.say("watched from the first version:")
	d.events(configs, metav1.ListOptions{ResourceVersion: "1"}, 1, nil)
	d.say("list now: %s", check(must(configs.List(d.ctx, metav1.ListOptions{})).Items))
}

// ttl makes events, which end with a lease of the store.
func ttl(d *driver) {
	ns := d.namespace("ttl")
	events := d.of("events", ns)
	begun := time.Now()
	for i := range 3 {
		must(events.Create(d.ctx, object(`{"apiVersion":"v1","kind":"Event","metadata":{"name":"e%d"},"involvedObject":{"kind":"Pod","namespace":%q,"name":"p"},
"reason":"r","message":"m","type":"Normal"}`, i, ns), metav1.CreateOptions{}))
	}
	d.say("created %v", d.names(events, metav1.ListOptions{}))
	time.Sleep(time.Until(begun.Add(4 * time.Second)))
	d.say("after 4 s there is %v", d.names(events, metav1.ListOptions{}))
	list := must(events.List(d.ctx, metav1.ListOptions{}))
	gone := 0
	watcher := must(events.Watch(d.ctx, metav1.ListOptions{ResourceVersion: list.GetResourceVersion()}))
	defer watcher.Stop()
	for gone < 3 {
		select {
		case event := <-watcher.ResultChan():
			if event.Type == watch.Deleted {
				gone++
			}
		case <-time.After(patience):
			fail("of 3 events %d ended", gone)
		}
	}
	d.note("events ended after %.1f s", time.Since(begun).Seconds())
	d.say("all were seen to end; there is %v", d.names(events, metav1.ListOptions{}))
}

// sizes tries objects around the largest that the store takes.
func sizes(d *driver) {
	d.define()
	ns := d.namespace("sizes")
	for _, kib := range []int{900, 1023, 1024, 1025, 1200, 1450, 1535, 1536, 1600, 2000, 2047, 2048, 2200, 2900, 3100} {
		value := strings.Repeat("x", kib<<10)
		name := fmt.Sprintf("s%d", kib)
		_, ofMap := d.of("configmaps", ns).Create(d.ctx, configMap(name, value), metav1.CreateOptions{})
		_, ofWidget := d.of("widgets", ns).Create(d.ctx, widget(name, value), metav1.CreateOptions{})
		d.say("%d KiB: config map %.200s; widget %.200s", kib, describe(ofMap), describe(ofWidget))
	}
	for _, resource := range []string{"configmaps", "widgets"} {
		d.say("%s: %v", resource, d.names(d.of(resource, ns), metav1.ListOptions{}))
	}
}

// load is for the figures.
func load(d *driver) {
	const count = 5000
	configs := d.of("configmaps", d.namespace("load"))
	d.ask("figures before")
	took := d.fill(configs, count, 32, strings.Repeat("v", 1000))
	d.note("%d created by 32 workers in %.1f s, %.0f/s", count, took.Seconds(), count/took.Seconds())
	d.ask("figures created")
	begun := time.Now()
	d.say("all: %s", check(must(configs.List(d.ctx, metav1.ListOptions{})).Items))
	d.note("listed in %.2f s", time.Since(begun).Seconds())
	begun = time.Now()
	items, pages, err := d.walk(configs, metav1.ListOptions{Limit: 500})
	d.say("in pages: %s %s %s", describe(err), check(items), pages)
	d.note("listed in pages in %.2f s", time.Since(begun).Seconds())
	d.ask("figures listed")
	begun = time.Now()
	must("", configs.DeleteCollection(d.ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	d.note("deleted in %.1f s", time.Since(begun).Seconds())
	d.ask("figures deleted")
}
