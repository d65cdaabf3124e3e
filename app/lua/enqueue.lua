-- A new job. Run twice with the same id (a network write that is tried again), it enqueues once.
-- ARGV: queue, job id, at front (1 or 0), most jobs that may wait, seconds to live while waiting or '', fields of the
-- job's hash and their values, as RQ writes them.
-- Answers {'created', time of it}, {'exists'} or {'full'}.
local queue, id, at_front, limit, ttl = ARGV[1], ARGV[2], ARGV[3] == '1', tonumber(ARGV[4]), ARGV[5]
if redis.call('EXISTS', job_key(id)) == 1 then return {'exists'} end
if redis.call('LLEN', queue_key(queue)) >= limit then return {'full'} end

local stamp = timestamp(clock())
-- In slices: Lua's unpack has a limit, and a job may carry any number of fields.
for first = 6, #ARGV, 100 do
  redis.call('HSET', job_key(id), unpack(ARGV, first, math.min(first + 99, #ARGV)))
end
redis.call('HSET', job_key(id), 'created_at', stamp, 'enqueued_at', stamp, 'status', 'queued')
push(id, queue, at_front)
if ttl ~= '' then redis.call('EXPIRE', job_key(id), ttl) end
return {'created', stamp}
