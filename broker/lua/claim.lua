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

-- A candidate is an adapter, or the base model, that has jobs to claim: {name, number of its waiting jobs,
-- its bands, its best priority, since when it is unserved, whether that is for too long}. A band is
-- {adapter, priority, since when it is unserved}.
local seen, fullest = {}, nil

-- The candidates among some names that were not seen before.
local function candidates_of(names)
  local found = {}
  if #names == 0 then return found end
  local waiting, moments = redis.call('HMGET', WAITING, unpack(names)), {}
  for i, priority in ipairs(ready_priorities) do
    moments[i] = redis.call('ZMSCORE', READY .. PRIORITIES[priority], unpack(names))
  end
  for i, name in ipairs(names) do
    seen[name] = true
    local bands, since = {}, nil
    for k, priority in ipairs(ready_priorities) do
      local moment = tonumber(moments[k][i] or '')
      if moment then
        table.insert(bands, { adapter = name, priority = priority, since = moment })
        since = math.min(since or moment, moment)
      end
    end
    if since then
      local candidate = { name = name, num_waiting = tonumber(waiting[i] or 0), bands = bands,
        priority = bands[1].priority, since = since, is_starved = since < starved_before }
      if not fullest or candidate.num_waiting > fullest.num_waiting then fullest = candidate end
      table.insert(found, candidate)
    end
  end
  return found
end

-- Adapters that need no slot any more, and the base model.
local function find_what_has_a_slot()
  local names = { not draining[BASE] and BASE or nil }
  for name in pairs(in_use) do
    if not draining[name] then table.insert(names, name) end
  end
  return candidates_of(names)
end

local picks, slotless = find_what_has_a_slot(), {}

local function append(candidates, list)
  for _, candidate in ipairs(candidates) do table.insert(list, candidate) end
end

-- Walks over the other ready adapters of one priority, longest unserved first, as far as there may
-- be slots for them; without a free one only that counts which waits for longest. An adapter that
-- only another worker has is left to it; one that the queue does not know at all is taken, so that
-- its jobs fail.
local function find_what_wants_a_slot(priority)
  local first, window = 0, free_slots > 0 and 256 or 32
  local left = free_slots > 0 and window or 1
  while left > 0 do
    local ready = redis.call('ZRANGE', READY .. priority, first, first + window - 1)
    local names, own, unknown = {}, {}, {}
    for _, name in ipairs(ready) do
      if name ~= BASE and not in_use[name] and not seen[name] then table.insert(names, name) end
    end
    local is_own = #names > 0
      and redis.call('SMISMEMBER', WORKER .. worker .. ':adapters', unpack(names)) or {}
    for i, name in ipairs(names) do
      if left == 0 then break end
      if is_own[i] == 1 then
        table.insert(own, name)
        left = left - 1
      elseif redis.call('HEXISTS', ADAPTERS, name) == 0 then
        table.insert(unknown, name)
      end
    end
    append(candidates_of(own), slotless)
    append(candidates_of(unknown), picks)
    if #ready < window then return end
    first = first + window
  end
end

for _, priority in ipairs(ready_priorities) do find_what_wants_a_slot(PRIORITIES[priority]) end

local function gets_a_slot_before(a, b)
  if a.is_starved ~= b.is_starved then return a.is_starved end
  if a.is_starved and a.since ~= b.since then return a.since < b.since end
  if a.priority ~= b.priority then return a.priority < b.priority end
  if (a == fullest) ~= (b == fullest) then return a == fullest end
  if a.num_waiting ~= b.num_waiting then return a.num_waiting < b.num_waiting end
  if resident[a.name] ~= resident[b.name] then return resident[a.name] == true end
  if a.since ~= b.since then return a.since < b.since end
  return a.name < b.name
end

-- The first `count` of those that want a slot, in order: each finds its place in a short list, as they
-- come almost in order and few are wanted of hundreds.
local function first_slotless(count)
  local sorted = {}
  for _, candidate in ipairs(slotless) do
    local place = #sorted + 1
    while place > 1 and gets_a_slot_before(candidate, sorted[place - 1]) do place = place - 1 end
    if place <= count then
      table.insert(sorted, place, candidate)
      sorted[count + 1] = nil
    end
  end
  return sorted
end

local next_ones = first_slotless(free_slots + 1)
local starving = next_ones[free_slots + 1]
next_ones[free_slots + 1] = nil
append(next_ones, picks)
starving = starving and starving.is_starved and starving.name or ''

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
for _, candidate in ipairs(picks) do highest = math.min(highest, candidate.priority) end

-- What is served in the same round is served in turn.
local function round_of(band)
  local is_starved = band.since < starved_before
  local priority = (is_starved or priorities_in_turn) and highest or band.priority
  local waits = band.adapter == fullest.name and not fullest_in_turn and not is_starved
  return 2 * priority - (waits and 0 or 1)
end

local rounds = {}
for round = 1, 2 * #PRIORITIES do rounds[round] = {} end
for _, candidate in ipairs(picks) do
  for _, band in ipairs(candidate.bands) do table.insert(rounds[round_of(band)], band) end
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
