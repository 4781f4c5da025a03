#!/usr/bin/env bash
# github.com/sashabaranov/go-openai: keep-alive comments end a stream that is only slow
#
# Expected: lines that begin with a colon are comments of an event stream. Servers send them so that
#   nothing between closes a connection while a model reads a long prompt or a request waits for its
#   turn; a client passes over them, however many there are.
# Happens:  each comment and the empty line after it count as empty messages, and after 300 in a row
#   `Recv` gives "stream has sent too many empty messages": a ping each second ends every answer that
#   takes longer than two and a half minutes to begin. The limit is a setting (EmptyMessagesLimit).
#
# Versions: go-openai v1.43.0, go 1.26. Seen: 2026-11-30.
# Needs: bash, go.
#
# Output seen:
#   150 comments first: "hello" <nil>
#   151 comments first: "" stream has sent too many empty messages
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > go.mod <<'MOD'
module keepalive

go 1.24

require github.com/sashabaranov/go-openai v1.43.0
MOD
cat > main.go <<'GO'
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"

	"github.com/sashabaranov/go-openai"
)

const answer = `data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",` +
	`"choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":"stop"}]}` + "\n\ndata: [DONE]\n\n"

// ask returns the text of an answer before which a server sends a number of comments.
func ask(comments int) (text string, err error) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, strings.Repeat(": ping\n\n", comments)+answer)
	}))
	defer server.Close()
	config := openai.DefaultConfig("none")
	config.BaseURL = server.URL + "/v1"
	request := openai.ChatCompletionRequest{
		Model:    "m",
		Messages: []openai.ChatCompletionMessage{{Role: "user", Content: "hello?"}},
	}
	stream, err := openai.NewClientWithConfig(config).CreateChatCompletionStream(context.Background(), request)
	if err != nil {
		return "", err
	}
	defer stream.Close()
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return text, nil
		}
		if err != nil {
			return text, err
		}
		text += response.Choices[0].Delta.Content
	}
}

func main() {
	few, errFew := ask(150)
	fmt.Printf("150 comments first: %q %v\n", few, errFew)
	many, errMany := ask(151)
	fmt.Printf("151 comments first: %q %v\n", many, errMany)
	if errFew != nil || few != "hello" || !errors.Is(errMany, openai.ErrTooManyEmptyStreamMessages) {
		os.Exit(1)
	}
}
GO
go mod tidy 2> /dev/null
go run .
