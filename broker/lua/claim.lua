-- Gives a worker jobs it can put into one batch: those of adapters it has in use, of the base
-- model, and of as many other adapters as it has free slots.
--   ARGV: worker, number of this claim, lease in ms, number of jobs, free slots, patience in ms,
--         n, then n adapters in use, m, then m adapters that may get no new jobs (draining),
--         then adapters resident in a slot that is not in use
--   Returns {now, starving, jobs, suspect, delayed, set aside, passed over}: starving is an adapter
--   that waits unserved for longer than the patience and found no slot ('' if none); each job is
--   {id, adapter, payload, attempts, queued, submission}; suspect is for how many ms the first one
--   that this worker can run waits, -1 if there is none; delayed is how many jobs wait to be tried
--   again later; set aside is how many were found now whose record is of a version that is not
--   read here; passed over are all entries that brought no job: there may be more behind them.
-- Safe to repeat, with the same number, until the next claim.
-- Free slots go to adapters that waited unserved beyond the patience, longest first; then to those
-- with jobs of a higher priority; of these to that with the most waiting jobs, which fill the batch,
-- unless one with more has a slot or needs none; then to those with the fewest, which soon make room
-- for the next; of equal ones first to those whose weights are resident.
-- Jobs are then shared priority by priority: among the adapters in turn, but the one with the most
-- waiting jobs gets what the others leave; and within an adapter among submissions in turn. Nobody
-- starves: in one claim of FULLEST_IN_TURN the fullest takes its turn with the others, in one of
-- PRIORITIES_IN_TURN all priorities do, and so does what waited unserved beyond the patience.
-- The scores of READY and LANES are moments: when one was last served, or when it came to have
-- waiting jobs. worker/scheduler.py has the same rule for what waits in the worker.
local FULLEST_IN_TURN, PRIORITIES_IN_TURN = 4, 8
local worker, claim, lease, wanted = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local free_slots, patience = tonumber(ARGV[5]), tonumber(ARGV[6])
local position = 7
local function read_set()
  local set, last = {}, position + tonumber(ARGV[position])
  for i = position + 1, last do set[ARGV[i]] = true end
  position = last + 1
  return set
end
local in_use, draining = read_set(), read_set()
local resident = {}
for i = position, #ARGV do resident[ARGV[i]] = true end

local now = now_ms()
local claimed, lease_end = text(now), text(now + lease)
local jobs = repeated_claim(worker, claim, lease, false)
if jobs then return { claimed, '', jobs, -1, 0, 0, 0 } end
jobs = {}
if redis.call('HEXISTS', PAUSED, '*') == 1 then return { claimed, '', jobs, -1, 0, 0, 0 } end
local starved_before = now_us() - 1000 * patience
local ready_priorities = {}
for priority, name in ipairs(PRIORITIES) do
  if redis.call('EXISTS', READY .. name) == 1 then table.insert(ready_priorities, priority) end
end
local num_waiting, bands, best_priority, unserved_since = {}, {}, {}, {}
local picks, slotless, fullest = {}, {}, nil

-- What can be claimed of an adapter: its number of waiting jobs, and its bands, {priority, adapter,
-- since}, with the moment since when each is unserved. Returns false if there is nothing.
local function look_at(name)
  bands[name] = {}
  for _, priority in ipairs(ready_priorities) do
    local since = tonumber(redis.call('ZSCORE', READY .. PRIORITIES[priority], name) or '')
    if since then
      table.insert(bands[name], { priority = priority, adapter = name, since = since })
      best_priority[name] = best_priority[name] or priority
      unserved_since[name] = math.min(unserved_since[name] or since, since)
    end
  end
  if #bands[name] == 0 then return false end
  num_waiting[name] = tonumber(redis.call('HGET', WAITING, name) or 0)
  if not fullest or num_waiting[name] > num_waiting[fullest] then fullest = name end
  return true
end

-- Adapters that need no slot any more, and the base model.
local function pick_what_has_a_slot(name)
  if not draining[name] and look_at(name) then table.insert(picks, name) end
end

-- Walks over the other ready adapters of one priority, longest unserved first, as far as there may
-- be slots for them; without a free one only that counts which waits for longest. An adapter that
-- only another worker has is left to it; one that the queue does not know at all is taken, so that
-- its jobs fail.
local function find_what_wants_a_slot(priority)
  local first, window = 0, 256
  local left = free_slots > 0 and window or 1
  while left > 0 do
    local found = redis.call('ZRANGE', READY .. priority, first, first + window - 1)
    for _, name in ipairs(found) do
      if name ~= BASE and not in_use[name] and not bands[name] and left > 0 then
        if redis.call('SISMEMBER', WORKER .. worker .. ':adapters', name) == 1 then
          look_at(name)
          table.insert(slotless, name)
          left = left - 1
        elseif redis.call('HEXISTS', ADAPTERS, name) == 0 then
          look_at(name)
          table.insert(picks, name)
        end
      end
    end
    if #found < window then return end
    first = first + window
  end
end

pick_what_has_a_slot(BASE)
for name in pairs(in_use) do pick_what_has_a_slot(name) end
for _, priority in ipairs(ready_priorities) do find_what_wants_a_slot(PRIORITIES[priority]) end

local function is_starved(name)
  return unserved_since[name] < starved_before
end

local function gets_a_slot_before(a, b)
  if is_starved(a) ~= is_starved(b) then return is_starved(a) end
  if is_starved(a) and unserved_since[a] ~= unserved_since[b] then
    return unserved_since[a] < unserved_since[b]
  end
  if best_priority[a] ~= best_priority[b] then return best_priority[a] < best_priority[b] end
  if (a == fullest) ~= (b == fullest) then return a == fullest end
  if num_waiting[a] ~= num_waiting[b] then return num_waiting[a] < num_waiting[b] end
  if resident[a] ~= resident[b] then return resident[a] == true end
  if unserved_since[a] ~= unserved_since[b] then return unserved_since[a] < unserved_since[b] end
  return a < b
end
table.sort(slotless, gets_a_slot_before)
for i = 1, math.min(free_slots, #slotless) do table.insert(picks, slotless[i]) end
local next_one = slotless[free_slots + 1]
local starving = next_one and is_starved(next_one) and next_one or ''

-- A claim takes no further jobs once their records have so many bytes, as its reply and what they
-- become in the worker are held at once. Of a lane so many are read together; what is read is taken.
local MAX_BYTES, READ_TOGETHER = 16 * 1024 * 1024, 8
local bytes_left = MAX_BYTES

-- Entries that bring no job are not free of cost: one script passes over so many and no more.
local MAX_PASSED_OVER = 1000
local num_passed_over, num_set_aside = 0, 0

-- Gives the worker the job of an entry, and returns the bytes of its record and its submissions; nil
-- if it cannot be lent, with what becomes of it done. `serve_lane` counts all of them at once, and
-- notes their leases.
local function deliver(lane, entry, id)
  local found = job_fields(id, 'state', 'v', 'adapter', 'submissions', 'attempts', 'job', 'queued',
    'deadline', 'alone')
  if not found then return fail_damaged(id, lane, entry, 'its key holds no hash') end
  local state, v, adapter, submissions, attempts, payload, queued, deadline, alone = unpack(found)
  local version = version_of(v, adapter, submissions, attempts, deadline)
  if not state and not v then
    if redis.call('EXISTS', SUBMISSION .. lane.submission) == 1 then
      return fail_damaged(id, lane, entry, 'it was deleted')
    end
    count('waiting', lane.adapter, -1, 0) -- All of its submission was.
    return drop_entry(lane, entry)
  elseif reads_version(tonumber(v)) and (version == 0 or not state) then
    return fail_damaged(id, lane, entry, 'fields are missing, or not of their kind')
  elseif not reads_version(version) then
    num_set_aside = num_set_aside + 1
    return set_aside(id, version)
  elseif state ~= 'waiting' then
    return drop_entry(lane, entry)
  end
  if deadline and tonumber(deadline) <= now then return expire(id) end
  if alone then return wait_for_turn(id) end
  if deadline then redis.call('ZREM', DEADLINES, id) end
  attempts = attempts + 1
  redis.call('HSET', JOB .. id, 'state', 'running', 'attempts', attempts, 'worker', worker,
    'claim', claim, 'entry', entry, 'claimed', claimed)
  -- A record without a prompt ends as a bad one where it is parsed.
  payload = payload or ''
  table.insert(jobs, { id, lane.adapter, payload, attempts, tonumber(queued) and queued or 0,
    string.match(submissions, '%S+') or '' })
  wanted, bytes_left = wanted - 1, bytes_left - #payload
  if bytes_left <= 0 then wanted = 0 end
  return #payload, submissions
end

-- Delivers up to `limit` jobs of a lane.
local function serve_lane(lane, limit)
  local num_read, num_delivered, num_bytes, is_empty = 0, 0, 0, false
  local leases, num_by_submission = {}, {}
  while num_read < limit and bytes_left > 0 and not is_empty do
    local asked = math.min(READ_TOGETHER, limit - num_read)
    local entries = read_entries(lane, asked)
    for _, entry in ipairs(entries) do
      local id = entry[2][2]
      local bytes, submissions = deliver(lane, entry[1], id)
      if bytes then
        num_delivered, num_bytes = num_delivered + 1, num_bytes + bytes
        table.insert(leases, lease_end)
        table.insert(leases, id)
        for submission in string.gmatch(submissions, '%S+') do
          num_by_submission[submission] = (num_by_submission[submission] or 0) + 1
        end
      end
    end
    num_read, is_empty = num_read + #entries, #entries < asked
  end
  num_passed_over = num_passed_over + num_read - num_delivered
  in_pieces(leases, function(...) redis.call('ZADD', LEASES, ...) end)
  for submission, number in pairs(num_by_submission) do
    count_moved(submission, 'waiting', 'running', number)
  end
  count('waiting', lane.adapter, -num_delivered, num_bytes)
  count('running', lane.adapter, num_delivered)
  if is_empty then return close_lane(lane) end
  redis.call('ZADD', LANES .. lane.band, 'XX', text(now_us()), lane.submission)
end

-- Delivers up to `limit` jobs of a band, an equal share of every lane first; returns whether there
-- may be more.
local function serve(band, limit)
  local adapter, priority = band.adapter, PRIORITIES[band.priority]
  local enough = wanted - limit
  while wanted > enough and num_passed_over < MAX_PASSED_OVER do
    local lanes = LANES .. adapter .. ':' .. priority
    local submissions = redis.call('ZRANGE', lanes, 0, wanted - enough - 1)
    if #submissions == 0 then return false end
    local share = math.max(1, math.floor((wanted - enough) / #submissions))
    for _, submission in ipairs(submissions) do
      local left = math.min(share, wanted - enough)
      if left > 0 then serve_lane(lane_in(adapter, priority, submission), left) end
    end
  end
  redis.call('ZADD', READY .. priority, 'XX', text(now_us()), adapter)
  return true
end

-- An equal share for every band first, then what is left to those that have more.
local function share_among(some)
  while wanted > 0 and #some > 0 and num_passed_over < MAX_PASSED_OVER do
    local share = math.max(1, math.floor(wanted / #some))
    local with_more = {}
    for _, band in ipairs(some) do
      if wanted <= 0 then break end
      if serve(band, math.min(share, wanted)) then table.insert(with_more, band) end
    end
    some = with_more
  end
end

-- The clock's last digits are as good as drawn by lot.
local lot = now_us()
local fullest_in_turn = lot % FULLEST_IN_TURN == 0
local priorities_in_turn = math.floor(lot / FULLEST_IN_TURN) % PRIORITIES_IN_TURN == 0

local highest = #PRIORITIES
for _, name in ipairs(picks) do highest = math.min(highest, best_priority[name]) end

-- What is served in the same round is served in turn.
local function round_of(band)
  local is_starved = band.since < starved_before
  local priority = (is_starved or priorities_in_turn) and highest or band.priority
  local waits = band.adapter == fullest and not fullest_in_turn and not is_starved
  return 2 * priority - (waits and 0 or 1)
end

local rounds = {}
for round = 1, 2 * #PRIORITIES do rounds[round] = {} end
for _, name in ipairs(picks) do
  for _, band in ipairs(bands[name]) do table.insert(rounds[round_of(band)], band) end
end
for _, round in ipairs(rounds) do
  table.sort(round, function(a, b)
    if a.since ~= b.since then return a.since < b.since end
    if a.adapter ~= b.adapter then return a.adapter < b.adapter end
    return a.priority < b.priority
  end)
  share_among(round)
end
note_claim(worker, claim, lease, jobs)
local _, suspect_since = first_suspect(worker)
return { claimed, starving, jobs, suspect_since and now - suspect_since or -1,
  redis.call('ZCARD', DELAYED), num_set_aside, num_passed_over }
