-- New jobs: one, or those of a group, all or none. Run twice with the same ids (a network write that is tried again),
-- it enqueues once.
-- ARGV: JSON of what holds for all of them, the number of strings that follow, the fields (and values) of the job's
-- hash that all share, as RQ writes them; then for each job its id, a number of strings, and its own fields.
--   count        how many jobs
--   queue        where they wait
--   owner        whose they are, as in the fields that they share
--   fn           name of their function, likewise
--   limit        how many jobs the queue may hold
--   at_front     ahead of what waits
--   ttl          seconds after which it is dropped if no worker took it
--   delay, at    not before so many seconds from now, or this time in seconds since 1970
--   group        id of the group, with group_ttl, the seconds that it is kept
--   key_id       stands for the request's idempotency key, if it has one (for a single job it is the job's id), with
--                the request's fingerprint and key_ttl, the seconds that the key is remembered at least
-- Answers {'created', time of it, status}, {'exists', fingerprint of the first request or ''} or {'full'}.
local all = cjson.decode(ARGV[1])
local shared_end = 2 + ARGV[2]
local key_mark, group_mark = RQ .. ':api:key:' .. (all.key_id or ''), RQ .. ':api:group:' .. (all.group or '')

-- Each job is asked for its fingerprint, and so is the single job that the key may stand for: the mark may have run out
-- before them.
local known, position = all.key_id and (redis.call('GET', key_mark) or read(all.key_id, 'fingerprint')[1]), shared_end + 1
local is_known = known or (all.group and redis.call('EXISTS', group_mark) == 1)
for _ = 1, all.count do
  local id = ARGV[position]
  if redis.call('EXISTS', job_key(id)) == 1 then
    is_known, known = true, known or read(id, 'fingerprint')[1]
  end
  position = position + 2 + ARGV[position + 1]
end
if is_known then return {'exists', known or ''} end
if length(all.queue) + all.count > all.limit then return {'full'} end

local now = clock()
local due = all.at or now + (all.delay or 0)
local status = due > now and 'scheduled' or 'queued'
local stamp = timestamp(now)

-- In slices: Lua's unpack has a limit, and a job may carry any number of fields.
local function write(key, first, last)
  for from = first, last, 100 do redis.call('HSET', key, unpack(ARGV, from, math.min(from + 99, last))) end
end

local ids, owners = {}, scopes(nil, all.owner or '')
position = shared_end + 1
for number = 1, all.count do
  local id, own_end = ARGV[position], position + 1 + ARGV[position + 1]
  local key = job_key(id)
  write(key, 3, shared_end)
  write(key, position + 2, own_end)
  if status == 'queued' then
    redis.call('HSET', key, 'created_at', stamp, 'status', status, 'enqueued_at', stamp)
  else
    redis.call('HSET', key, 'created_at', stamp, 'status', status)
    redis.call('ZADD', registry('scheduled', all.queue), exact(due + (number - 1) * 1e-6), id) -- in their order
  end
  if all.ttl then redis.call('EXPIRE', key, math.ceil(due > now and due - now or 0) + all.ttl) end
  for _, scope in ipairs(owners) do
    if scope ~= '' then redis.call('SADD', OWNERS, scope) end
    redis.call('ZADD', index(scope, status), microseconds(now) + number - 1, id)
  end
  tell(id, status)
  ids[number], position = id, own_end + 1
end

if status == 'queued' then
  -- The order of the jobs is the order in which they run, at the front too.
  for number = 1, all.count do push(ids[all.at_front and all.count + 1 - number or number], all.queue, all.at_front) end
  ring()
else
  redis.call('SADD', RQ .. ':queues', queue_key(all.queue))
end
if all.key_id then redis.call('SET', key_mark, all.fingerprint, 'EX', all.key_ttl) end
if all.group then
  redis.call('SADD', RQ .. ':groups', all.group)
  for _, id in ipairs(ids) do redis.call('SADD', RQ .. ':group:' .. all.group, id) end
  redis.call('EXPIRE', RQ .. ':group:' .. all.group, all.group_ttl)
  redis.call('SET', group_mark, all.count, 'EX', all.group_ttl)
end
count('enqueued', all.queue, all.fn, all.count)
return {'created', stamp, status}
