-- The messages that tell of a job's ends, the first one first.
-- ARGV: job id.
-- Answers for each {id, status or '', what it tells of, when it is tried next (seconds since 1970) or '', its tries (JSON)}.
local found = {}
for number, id in ipairs(redis.call('LRANGE', deliveries_key(ARGV[1]), 0, -1)) do
  local job = read(id, 'status', 'tells')
  local due = job[1] == 'scheduled' and redis.call('ZSCORE', registry('scheduled', WEBHOOKS), id)
  found[number] = {id, job[1] or '', job[2] or '', due or '', redis.call('LRANGE', tries_key(id), 0, -1)}
end
return found
