-- Create jobs: a single job, or all jobs of a group, or none. Sent twice with the same ids, because the first answer
-- was lost, it creates the jobs once.
-- ARGV: options as JSON (below); the length of the shared part; the shared part, which is the fields and values of all
-- jobs, as RQ writes them; then for each job its id, the length of its own part, and its own fields and values. A
-- length is a number of strings.
--   count        number of jobs
--   queue        name of their queue
--   owner        name of the API key that they belong to, as in the shared fields
--   fn           name of their function, as in the shared fields
--   limit        most jobs that the queue may hold
--   at_front     put them in front of the jobs that wait
--   ttl          seconds after which Redis drops a job that no worker took
--   delay, at    run them this many seconds from now, or at this time in seconds since 1970
--   group        id of the group, and group_ttl, seconds that the group is kept
--   key_id       id that was made from the request's idempotency key, if it has one (for a single job, the job's id)
--   fingerprint  of the request, to compare with the next request with this key; with key_id only
--   key_ttl      seconds that the key is remembered, or longer if the job is kept longer; with key_id only
-- Answers {'created', time of creation, status}, {'exists', fingerprint of the first request or ''} or {'full'}.
local options = cjson.decode(ARGV[1])
local shared_end = 2 + ARGV[2]
local idempotency_key = RQ .. ':api:key:' .. (options.key_id or '')

-- The fingerprint of the first request. The idempotency key may have expired before the jobs, so look at the jobs, too.
local fingerprint
if options.key_id then
  fingerprint = redis.call('GET', idempotency_key) or read(options.key_id, 'fingerprint')[1]
end
local exists = fingerprint or (options.group and redis.call('EXISTS', group_size_key(options.group)) == 1)
local position = shared_end + 1
for _ = 1, options.count do
  local id = ARGV[position]
  if redis.call('EXISTS', job_key(id)) == 1 then
    exists, fingerprint = true, fingerprint or read(id, 'fingerprint')[1]
  end
  position = position + 2 + ARGV[position + 1]
end
if exists then return {'exists', fingerprint or ''} end
if queue_length(options.queue) + options.count > options.limit then return {'full'} end

local now = clock()
local due = options.at or now + (options.delay or 0)
local status = due > now and 'scheduled' or 'queued'
local stamp = timestamp(now)

-- Write fields in slices: Lua's unpack has a limit, and a job may have any number of fields.
local function write(key, first, last)
  for from = first, last, 100 do redis.call('HSET', key, unpack(ARGV, from, math.min(from + 99, last))) end
end

local ids, owners = {}, index_scopes(nil, options.owner or '')
position = shared_end + 1
for number = 1, options.count do
  local id, own_end = ARGV[position], position + 1 + ARGV[position + 1]
  local key = job_key(id)
  write(key, 3, shared_end)
  write(key, position + 2, own_end)
  if status == 'queued' then
    redis.call('HSET', key, 'created_at', stamp, 'status', status, 'enqueued_at', stamp)
  else
    redis.call('HSET', key, 'created_at', stamp, 'status', status)
    -- A microsecond between two jobs keeps their order.
    redis.call('ZADD', registry_key('scheduled', options.queue), exact(due + (number - 1) * 1e-6), id)
  end
  if options.ttl then redis.call('EXPIRE', key, math.ceil(due > now and due - now or 0) + options.ttl) end
  for _, scope in ipairs(owners) do
    if scope ~= '' then redis.call('SADD', OWNERS, scope) end
    redis.call('ZADD', index_key(scope, status), microseconds(now) + number - 1, id)
  end
  log_event(id, status)
  ids[number], position = id, own_end + 1
end

if status == 'queued' then
  -- The jobs run in their order, even at the front of the queue: then the last one is pushed first.
  for number = 1, options.count do
    push(ids[options.at_front and options.count + 1 - number or number], options.queue, options.at_front)
  end
  wake_workers()
else
  redis.call('SADD', RQ .. ':queues', queue_key(options.queue))
end
if options.key_id then redis.call('SET', idempotency_key, options.fingerprint, 'EX', options.key_ttl) end
if options.group then
  redis.call('SADD', RQ .. ':groups', options.group)
  for _, id in ipairs(ids) do redis.call('SADD', group_key(options.group), id) end
  redis.call('EXPIRE', group_key(options.group), options.group_ttl)
  redis.call('SET', group_size_key(options.group), options.count, 'EX', options.group_ttl)
end
count('enqueued', options.queue, options.fn, options.count)
return {'created', stamp, status}
