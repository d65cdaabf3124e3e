-- End a run: the job is finished, failed or stopped, or it is tried again after an exception. A run that was asked to
-- stop ends `stopped`, even if it has finished or failed.
-- ARGV: job id, execution id, queue, worker, outcome (finished, failed, stopped), return value (base64 of JSON, '' for
-- null), exception (base64 of zlib), error (JSON), default result TTL, default failure TTL, progress (JSON or ''),
-- force (1 to end the job even if RQ's own code should, else 0), after (least seconds before a failed job is tried
-- again, '' for the job's own pause, -1 to try it no more).
-- Answers the job's new status; 'lost' if the run does not own the lease any more; 'rq' if only RQ's own code can end
-- this job. The last two write nothing for the job.
local id, execution, queue, worker, outcome, value, exception, error, result_ttl, failure_ttl, progress,
  force, after = unpack(ARGV)
local job = read(id, 'status', 'owner', 'stop_requested', 'result_ttl', 'failure_ttl', 'retries_left',
  'retry_intervals', 'enqueue_at_front_on_retry', 'repeats_left', 'rate_limit_key', 'webhooks', 'function', 'notify')
local owner, fn = job[2], job[12]
if clear_if_lost(id, execution, queue, worker, job[1]) then return 'lost' end

local key, now = job_key(id), clock()
if job[3] == execution then
  outcome, exception, error = 'stopped', STOPPED_EXCEPTION, STOPPED_ERROR
end
local retries_left = integer(job[6], 0)
local is_tried_again = outcome == 'failed' and retries_left > 0 and after ~= '-1'
if force == '0' and needs_rq(id, is_tried_again, unpack(job, 9, 11)) then return 'rq' end

local started = tonumber(redis.call('HGET', execution_key(id, execution), 'created_at')) or now
local result = {'worker_name', worker, 'execution_id', execution, 'execution_started_at', exact(started),
  'execution_ended_at', exact(now)}
end_execution(id, execution, queue, worker)
local minute, took = minute_key(queue, now), math.max(0, now - started)
redis.pcall('HINCRBY', minute, 'microseconds', math.floor(took * 1e6))
if redis.pcall('HINCRBY', minute, 'runs', 1) == 1 then redis.call('EXPIRE', minute, 180) end
observe('run', fn, took)
if progress ~= '' then redis.call('HSET', key, 'progress', progress) end

if outcome == 'finished' then
  count('finished', queue, fn)
  local ttl = integer(job[4], result_ttl)
  if ttl == 0 then
    redis.call('HSET', key, 'ended_at', timestamp(now))
    notify(id, 'finished', now)
    for _, scope in ipairs(index_scopes(id, owner)) do remove_from_index(scope, id, 'started') end
    redis.call('DEL', key, results_key(id), executions_key(id))
    log_event(id, 'finished')
    return 'finished'
  end
  -- Mark that we checked the value to be strict JSON. A reader need not check it again.
  result[#result + 1] = 'is_json'
  result[#result + 1] = 1
  if value ~= '' then
    result[#result + 1] = 'return_value'
    result[#result + 1] = value
  end
  local stamp = timestamp(now)
  redis.call('HSET', key, 'status', 'finished', 'ended_at', stamp, 'last_heartbeat', stamp)
  redis.call('XADD', results_key(id), 'MAXLEN', 10, '*', 'type', 1, unpack(result))
  set_retention(id, queue, 'finished', ttl, now)
  change_status(id, 'started', 'finished', owner)
  if job[13] then notify(id, 'finished', now) end
  return 'finished'
end

if is_tried_again then
  count('retried', queue, fn)
  redis.call('HSET', key, 'retries_left', retries_left - 1)
  local is_json, intervals = pcall(cjson.decode, job[7] or '[]')
  if not is_json or type(intervals) ~= 'table' then intervals = {} end
  local pause = math.max(number(intervals[math.max(#intervals - retries_left, 0) + 1], 0), number(after, 0))
  if pause > 0 then
    redis.call('HSET', key, 'status', 'scheduled', 'started_at', '', 'worker_name', '')
    redis.call('HDEL', key, 'progress')
    redis.call('ZADD', registry_key('scheduled', queue), exact(now + pause), id)
    change_status(id, 'started', 'scheduled', owner)
    return 'scheduled'
  end
  make_waiting(id, 'started', queue, job[8] == '1', now)
  return 'queued'
end

result[#result + 1] = 'exc_string'
result[#result + 1] = exception
store_failure(id, 'started', queue, outcome, integer(job[5], failure_ttl), result, error, now, owner)
return outcome
