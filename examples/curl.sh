#!/bin/sh
# Speech with curl: sh examples/curl.sh [http://localhost:8000]; writes whole.wav, stream.wav and headers.txt.
set -e
server=${1:-http://localhost:8000}

# A whole answer. The headers have the finish reason and the request's id.
curl -fsS "$server/generate" -o whole.wav -D headers.txt -H 'Content-Type: application/json' \
  -d '{"text": "Hello there.", "seed": 1}'
grep -i '^x-' headers.txt

# Audio as it is made: -N keeps curl from waiting for a full buffer.
curl -fsSN "$server/generate" -o stream.wav -H 'Content-Type: application/json' \
  -d '{"text": "Hello there.", "seed": 1, "streaming": true}'

# A form, with an id of your own for the log. An error is JSON, and -f would hide it.
curl -sS "$server/generate" -H 'X-Request-Id: example-1' -F text='Hello there.' -F speaker=7
echo
