-- A group's jobs, whatever their payloads. (`SORT … GET` would do, but wants to be allowed to read all keys.)
-- ARGV: group id.
-- Answers {how many it was made of or '', their statuses, '' for those that are not kept any more}.
local statuses = {}
for number, id in ipairs(redis.call('SMEMBERS', RQ .. ':group:' .. ARGV[1])) do
  statuses[number] = read(id, 'status')[1] or ''
end
return {redis.call('GET', RQ .. ':api:group:' .. ARGV[1]) or '', statuses}
