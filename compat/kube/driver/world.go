package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	watchtools "k8s.io/client-go/tools/watch"
	"k8s.io/client-go/util/retry"
)

// conflicts has many clients count in one object.
func conflicts(d *driver) {
	const workers, times = 8, 25
	leases := d.of("leases", d.namespace("conflicts"))
	must(leases.Create(d.ctx, object(`{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"l"},"spec":{"leaseTransitions":0}}`),
		metav1.CreateOptions{}))
	patient := retry.DefaultRetry
	patient.Steps, patient.Cap = 1000, time.Second
	var refused atomic.Int64
	d.workers(workers, workers*times, func(int) {
		must("", retry.RetryOnConflict(patient, func() error {
			lease, err := leases.Get(d.ctx, "l", metav1.GetOptions{})
			if err != nil {
				return err
			}
			count, _, _ := unstructured.NestedInt64(lease.Object, "spec", "leaseTransitions")
			must("", unstructured.SetNestedField(lease.Object, count+1, "spec", "leaseTransitions"))
			_, err = leases.Update(d.ctx, lease, metav1.UpdateOptions{})
			if apierrors.IsConflict(err) {
				refused.Add(1)
			}
			return err
		}))
	})
	lease := must(leases.Get(d.ctx, "l", metav1.GetOptions{}))
	d.say("counted to %v, with conflicts: %t", lease.Object["spec"], refused.Load() > 0)
	d.note("%d conflicts", refused.Load())
}

// election has candidates lead in turn; every second one goes without giving the lease back.
func election(d *driver) {
	const candidates = 5
	ns := d.namespace("election")
	var leading, most, terms atomic.Int64
	var group sync.WaitGroup
	for i := range candidates {
		group.Go(func() {
			ctx, cancel := context.WithTimeout(d.ctx, patience)
			defer cancel()
			lock := must(resourcelock.New(resourcelock.LeasesResourceLock, ns, "leader", nil, d.client.CoordinationV1(),
				resourcelock.ResourceLockConfig{Identity: fmt.Sprintf("c%d", i)}))
			leaderelection.RunOrDie(ctx, leaderelection.LeaderElectionConfig{
				Lock: lock, LeaseDuration: 4 * time.Second, RenewDeadline: 3 * time.Second, RetryPeriod: 300 * time.Millisecond,
				ReleaseOnCancel: i%2 == 0,
				Callbacks: leaderelection.LeaderCallbacks{
					OnStartedLeading: func(ctx context.Context) {
						now := leading.Add(1)
						for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
						}
						terms.Add(1)
						time.Sleep(1500 * time.Millisecond)
						leading.Add(-1)
						cancel()
					},
					OnStoppedLeading: func() {},
				},
			})
		})
	}
	group.Wait()
	d.say("%d candidates led %d times, at most %d at a time", candidates, terms.Load(), most.Load())
}

// written is the last that is known of an object.
type written struct {
	version int64
	there   bool
	sure    bool
}

// world is a namespace in which writers write while everything around them is stopped and started, and watchers look on.
type world struct {
	*driver
	resource string
	items    dynamic.ResourceInterface
	informer cache.SharedIndexInformer

	mu           sync.Mutex
	last         map[string]written
	acknowledged map[int64]string
	seen         map[int64]string
	view         map[string]int64
	gaps         [][2]int64
	disorder     []string
	failures     int
	watched      int64
}

func newWorld(d *driver, ctx context.Context, resource, namespace string) *world {
	w := &world{driver: d, resource: resource, items: d.of(resource, namespace), last: map[string]written{},
		acknowledged: map[int64]string{}, seen: map[int64]string{}, view: map[string]int64{}}
	kind, known := kinds[resource]
	if !known {
		kind.Version, kind.Resource = "v1", resource
	}
	factory := dynamicinformer.NewFilteredDynamicSharedInformerFactory(d.dynamic, 0, namespace, nil)
	w.informer = factory.ForResource(kind).Informer()
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	go w.watch(ctx)
	return w
}

// watch keeps a list of everything that happens from some time on. Where history is gone it starts anew. What came
// before a start is a gap.
func (w *world) watch(ctx context.Context) {
	source := cache.ToListerWatcherWithContext(&cache.ListWatch{
		ListFunc: func(options metav1.ListOptions) (runtime.Object, error) { return w.items.List(ctx, options) },
		WatchFunc: func(options metav1.ListOptions) (watch.Interface, error) {
			return w.items.Watch(ctx, options)
		},
	})
	for ; ctx.Err() == nil; time.Sleep(200 * time.Millisecond) {
		list, err := w.items.List(ctx, metav1.ListOptions{})
		if err != nil {
			continue
		}
		w.mu.Lock()
		w.gaps = append(w.gaps, [2]int64{w.watched, must(strconv.ParseInt(list.GetResourceVersion(), 10, 64))})
		w.view = versions(list.Items)
		w.mu.Unlock()
		watcher, err := watchtools.NewRetryWatcherWithContext(ctx, list.GetResourceVersion(), source)
		if err != nil {
			continue
		}
		for event := range watcher.ResultChan() {
			item, is := event.Object.(*unstructured.Unstructured)
			if !is || event.Type == watch.Error || event.Type == watch.Bookmark {
				continue
			}
			w.mu.Lock()
			at := version(item)
			if at <= w.watched {
				w.disorder = append(w.disorder, fmt.Sprintf("%s %s at %d after %d", event.Type, item.GetName(), at, w.watched))
			}
			w.watched = at
			w.seen[at] = item.GetName()
			if w.view[item.GetName()] = at; event.Type == watch.Deleted {
				delete(w.view, item.GetName())
			}
			w.mu.Unlock()
		}
	}
}

// write creates, updates and deletes objects of its own until told to stop.
func (w *world) write(ctx context.Context, writer int) {
	for round := 0; ctx.Err() == nil; round++ {
		name := fmt.Sprintf("w%d-%d", writer, rand.IntN(25))
		item := configMap(name, strconv.Itoa(round))
		if w.resource == "widgets" {
			item = widget(name, strconv.Itoa(round))
		}
		w.mu.Lock()
		before := w.last[name]
		w.mu.Unlock()
		call, cancel := context.WithTimeout(w.ctx, 10*time.Second)
		after := written{there: true, sure: true}
		var err error
		var result *unstructured.Unstructured
		switch {
		case !before.there:
			result, err = w.items.Create(call, item, metav1.CreateOptions{})
		case round%5 == 0:
			err = w.items.Delete(call, name, metav1.DeleteOptions{})
			after.there = false
		default:
			item.SetResourceVersion(strconv.FormatInt(before.version, 10))
			result, err = w.items.Update(call, item, metav1.UpdateOptions{})
		}
		cancel()
		if err != nil {
			after = w.lookUp(name)
		} else if result != nil {
			after.version = version(result)
		}
		w.mu.Lock()
		if err != nil {
			w.failures++
		} else if result != nil {
			w.acknowledged[after.version] = name
		}
		w.last[name] = after
		w.mu.Unlock()
		time.Sleep(5 * time.Millisecond)
	}
}

// lookUp asks what became of a write that failed. A later one may still take effect: nothing is sure until the next.
func (w *world) lookUp(name string) written {
	for begun := time.Now(); time.Since(begun) < patience; time.Sleep(100 * time.Millisecond) {
		call, cancel := context.WithTimeout(w.ctx, 10*time.Second)
		item, err := w.items.Get(call, name, metav1.GetOptions{})
		cancel()
		if err == nil {
			return written{version: version(item), there: true}
		}
		if apierrors.IsNotFound(err) {
			return written{}
		}
	}
	return written{}
}

// settle compares all who looked on with what was acknowledged and what is there.
func (w *world) settle() {
	list := must(w.items.List(w.ctx, metav1.ListOptions{}))
	there := versions(list.Items)
	took := w.eventually(w.resource+": the informer has what is there", func() bool {
		has := map[string]int64{}
		for _, item := range w.informer.GetStore().List() {
			has[item.(*unstructured.Unstructured).GetName()] = version(item.(*unstructured.Unstructured))
		}
		return maps.Equal(has, there)
	})
	w.eventually(w.resource+": the watch comes to what is there", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return maps.Equal(w.view, there)
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	var lost, missed []string
	for name, last := range w.last {
		if version, have := there[name]; last.sure && (have != last.there || last.there && version != last.version) {
			lost = append(lost, fmt.Sprintf("%s: acknowledged %v, is %d", name, last, version))
		}
	}
	for version, name := range w.acknowledged {
		if w.seen[version] != name && !w.excused(version) {
			missed = append(missed, fmt.Sprintf("%s at %d", name, version))
		}
	}
	w.say("%s: informer converged; acknowledged and not there: %v; acknowledged and not seen by the watch: %v; seen out of order: %v",
		w.resource, lost, missed, w.disorder)
	w.note("%s: %d writes acknowledged, %d failed, %d events, %d gaps in the watch, converged after %.1f s", w.resource,
		len(w.acknowledged), w.failures, len(w.seen), len(w.gaps)-1, took.Seconds())
}

// excused says whether a version came before the watch began, or was gone when it wanted to go on from there.
func (w *world) excused(version int64) bool {
	return slices.ContainsFunc(w.gaps, func(gap [2]int64) bool { return gap[0] < version && version <= gap[1] })
}

func versions(items []unstructured.Unstructured) map[string]int64 {
	result := map[string]int64{}
	for i := range items {
		result[items[i].GetName()] = version(&items[i])
	}
	return result
}

// through has two worlds live through what is done to the servers.
func (d *driver) through(requests ...string) {
	d.define()
	ns := d.namespace("through-" + strings.ToLower(strings.ReplaceAll(requests[0], " ", "-")))
	watching, end := context.WithCancel(d.ctx)
	defer end()
	worlds := []*world{newWorld(d, watching, "configmaps", ns), newWorld(d, watching, "widgets", ns)}
	writing, stop := context.WithCancel(d.ctx)
	var group sync.WaitGroup
	for _, w := range worlds {
		for writer := range 3 {
			group.Go(func() { w.write(writing, writer) })
		}
	}
	d.say("through %s:", strings.Join(requests, ", "))
	func() {
		defer func() { stop(); group.Wait() }()
		for _, request := range requests {
			time.Sleep(3 * time.Second)
			d.ask(request)
		}
		time.Sleep(3 * time.Second)
	}()
	for _, w := range worlds {
		w.settle()
	}
}

func restarts(d *driver) {
	d.through("restart-store TERM")
	d.through("restart-store KILL", "restart-store KILL")
	d.through("restart-apiserver")
}

func members(d *driver) {
	d.through("kill-leader", "start-member")
	d.through("kill-follower", "start-member")
	d.ask("same")
}

var series = regexp.MustCompile(`(?m)^([a-z0-9_]+)(?:\{(.*)\})? ([0-9.e+-]+)$`)

// metrics reads what the API server counted on its side of the store.
func metrics(d *driver) {
	body, err := d.get("/metrics")
	if err != nil {
		fail("%v", err)
	}
	sums := map[string]float64{}
	for _, found := range series.FindAllStringSubmatch(body, -1) {
		labels, _ := url.ParseQuery(strings.NewReplacer(`",`, `&`, `"`, ``).Replace(found[2]))
		value, _ := strconv.ParseFloat(found[3], 64)
		name := found[1]
		switch name {
		case "apiserver_watch_cache_consistent_read_total":
			name += " success=" + labels.Get("success") + " fallback=" + labels.Get("fallback")
		case "apiserver_storage_list_duration_seconds_count":
			name += " streamed=" + labels.Get("streamed")
		case "etcd_request_errors_total", "apiserver_storage_consistency_checks_total", "apiserver_storage_decode_errors_total",
			"apiserver_watch_cache_initialization_errors_total":
			name += " " + labels.Get("operation") + labels.Get("status")
		case "apiserver_storage_size_bytes", "apiserver_watch_cache_read_wait_seconds_sum", "apiserver_watch_cache_read_wait_seconds_count":
		default:
			continue
		}
		sums[name] += value
	}
	for _, name := range slices.Sorted(maps.Keys(sums)) {
		d.note("%s %.6g", name, sums[name])
		if strings.Contains(name, "consistent_read") || strings.Contains(name, "consistency") || strings.Contains(name, "streamed") ||
			strings.Contains(name, "size_bytes") {
			d.say("%s: some: %t", name, sums[name] > 0)
		}
	}
}
