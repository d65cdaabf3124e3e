-- Keep the index of `/jobs` in step with the jobs: those whose keys have run out leave it, and those that RQ's own code
-- moved (a stock worker, `Job.cancel`) are put right. Each call looks at a hundred jobs of each set, from where the last
-- one stopped, and at more while many of them are gone, as Redis itself expires keys. Once a second, whoever calls.
-- Answers how many entries it changed.
if not redis.call('SET', RQ .. ':api:swept', 1, 'NX', 'PX', 1000) then return 0 end

local POSITIONS = RQ .. ':api:sweep'
local changed = 0

local function sweep(scope, status)
  local key = index(scope, status)
  local position = redis.call('HGET', POSITIONS, key) or '-inf'
  for _ = 1, 50 do
    local page = redis.call('ZRANGEBYSCORE', key, position, '+inf', 'WITHSCORES', 'LIMIT', 0, 100)
    local wrong = 0
    for at = 1, #page, 2 do
      local id = page[at]
      local job = read(id, 'status', 'created_at')
      if job[1] ~= status or not job[2] then
        wrong = wrong + 1
        redis.call('ZREM', key, id)
        if job[1] and job[2] then redis.call('ZADD', index(scope, job[1]), page[at + 1], id) end
      end
    end
    changed = changed + wrong
    if #page < 200 then
      redis.call('HDEL', POSITIONS, key)
      return
    end
    position = '(' .. page[#page]
    if wrong < 25 then break end
  end
  redis.call('HSET', POSITIONS, key, position)
end

for _, status in ipairs(STATUSES) do sweep('', status) end
-- Some of the owners, whichever: a thousand of them must not keep Redis from all others.
for _, owner in ipairs(redis.call('SRANDMEMBER', OWNERS, 10)) do
  local entries = 0
  for _, status in ipairs(STATUSES) do
    sweep(owner, status)
    entries = entries + redis.call('ZCARD', index(owner, status))
  end
  if entries == 0 then redis.call('SREM', OWNERS, owner) end
end
return changed
