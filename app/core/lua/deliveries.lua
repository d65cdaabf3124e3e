-- Read the messages to webhooks about a job's ends, the oldest first. It changes nothing.
-- ARGV: job id.
-- Answers for each message {its id; its own status, '' if it is gone; the status that it reports; the time of its next
-- try in seconds since 1970, or ''; its tries as JSON}.
local found = {}
for number, id in ipairs(redis.call('LRANGE', deliveries_key(ARGV[1]), 0, -1)) do
  local job = read(id, 'status', 'tells')
  local due = job[1] == 'scheduled' and redis.call('ZSCORE', registry_key('scheduled', WEBHOOKS), id)
  found[number] = {id, job[1] or '', job[2] or '', due or '', redis.call('LRANGE', tries_key(id), 0, -1)}
end
return found
