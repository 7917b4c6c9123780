// A client of the test's server: client ADDRESS:PORT. Exit code: how many bytes came.
package main

import (
	"io"
	"net"
	"os"
)

func main() {
	connection, err := net.Dial("tcp", os.Args[1])
	if err != nil {
		println(err.Error())
		os.Exit(255)
	}
	bytes, _ := io.ReadAll(connection)
	os.Exit(len(bytes))
}
