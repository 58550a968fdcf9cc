-- What wrk asks for: a random user, or a new one, each time.
-- wrk … -- get|create USERS SEED
-- It runs with one thread, so that the counters here are all there are.

-- Global, for `done` to read it.
succeeded = 0

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local operation, users, seed = args[1], tonumber(args[2]), tonumber(args[3])
  math.randomseed(seed)
  if operation == "get" then
    request = function()
      local path = string.format("/users/0190a3c0-0000-7000-8000-%012d", math.random(users))
      return wrk.format("GET", path)
    end
  else
    local created = 0
    local headers = { ["Content-Type"] = "application/json" }
    request = function()
      created = created + 1
      local name = string.format("u%d_%d", seed, created)
      local body = string.format(
        '{"username": "%s", "email": "%s@example.com", "display_name": "A new user"}', name, name)
      return wrk.format("POST", "/users", headers, body)
    end
  end
end

function response(status)
  if status >= 200 and status < 300 then
    succeeded = succeeded + 1
  end
end

function done(summary, latency)
  local succeeded, errors = threads[1]:get("succeeded"), summary.errors
  local failed = summary.requests - succeeded + errors.connect + errors.read + errors.write
  print(string.format(
    '{"ok": %d, "errors": %d, "seconds": %f, "p50_us": %d, "p99_us": %d}',
    succeeded, failed, summary.duration / 1e6, latency:percentile(50), latency:percentile(99)))
end
