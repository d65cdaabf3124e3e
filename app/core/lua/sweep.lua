-- Clean the index of `/jobs`: remove the jobs whose hash has expired, and move the jobs whose status RQ's own code
-- changed (a stock worker, `Job.cancel`). Each call looks at a hundred jobs of each set, from the place where the last
-- call stopped. It goes on while many of them are wrong, as Redis does when it expires keys. But the number of jobs is
-- limited, because Redis serves no other client meanwhile. Many workers call it; it does its work once a second.
-- ARGV: none.
-- Answers the number of entries that it changed.
if not redis.call('SET', RQ .. ':api:swept', 1, 'NX', 'PX', 1000) then return 0 end

local POSITIONS = RQ .. ':api:sweep'
-- The most jobs that a call looks at: of all jobs, and again of a few owners' jobs. Each set gets its first hundred
-- anyway.
local MOST = 3000
local changed, left = 0, MOST

local function sweep(scope, status)
  local key = index_key(scope, status)
  local position = redis.call('HGET', POSITIONS, key) or '-inf'
  repeat
    local page = redis.call('ZRANGEBYSCORE', key, position, '+inf', 'WITHSCORES', 'LIMIT', 0, 100)
    local wrong = 0
    for at = 1, #page, 2 do
      local id = page[at]
      local job = read(id, 'status', 'created_at')
      if job[1] ~= status or not job[2] then
        wrong = wrong + 1
        redis.call('ZREM', key, id)
        if job[1] and job[2] then redis.call('ZADD', index_key(scope, job[1]), page[at + 1], id) end
      end
    end
    changed, left = changed + wrong, left - #page / 2
    if #page < 200 then
      redis.call('HDEL', POSITIONS, key)
      return
    end
    position = '(' .. page[#page]
  until wrong < 25 or left <= 0
  redis.call('HSET', POSITIONS, key, position)
end

for _, status in ipairs(STATUSES) do sweep('', status) end
left = MOST
for _, owner in ipairs(redis.call('SRANDMEMBER', OWNERS, 4)) do
  local entries = 0
  for _, status in ipairs(STATUSES) do
    sweep(owner, status)
    entries = entries + redis.call('ZCARD', index_key(owner, status))
  end
  if entries == 0 then redis.call('SREM', OWNERS, owner) end
end
return changed
