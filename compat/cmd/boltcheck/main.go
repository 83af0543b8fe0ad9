// Command boltcheck opens database files with the real bbolt and has it check every page; then it says how many entries
// each bucket has. Exit code 1: something is wrong with one of them.
package main

import (
	"fmt"
	"os"

	bolt "go.etcd.io/bbolt"
)

func check(path string) error {
	db, err := bolt.Open(path, 0o400, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bolt.Tx) error {
		for err := range tx.Check(bolt.WithKVStringer(bolt.HexKVStringer())) {
			return err
		}
		return tx.ForEach(func(name []byte, bucket *bolt.Bucket) error {
			entries := 0
			err := bucket.ForEach(func(_, _ []byte) error {
				entries++
				return nil
			})
			fmt.Printf("%s: %d\n", name, entries)
			return err
		})
	})
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: boltcheck FILE...")
		os.Exit(2)
	}
	for _, path := range os.Args[1:] {
		if err := check(path); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
			os.Exit(1)
		}
	}
}
