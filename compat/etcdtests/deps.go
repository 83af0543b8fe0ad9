//go:build deps

// Package etcdtests keeps in go.mod what etcd's tests are built with; it is never built itself. Go counts the imports
// of this file in spite of its build tag, but not those of another module's tests.
package etcdtests

import (
	_ "go.etcd.io/etcd/tests/v3/framework/e2e"
	_ "go.etcd.io/etcd/tests/v3/framework/integration"
	_ "go.etcd.io/etcd/tests/v3/framework/unit"
	_ "go.etcd.io/etcd/tests/v3/robustness/report"
)
