/*
 * One restore or dump at a time: shared declarations.
 *
 *   restore.c		messages from the host, deadlines
 *   restore_hook.c	CRIU's hook, and the tree that it holds
 *   restore_end.c	commit, failure and abort, and their reports to the host
 *   dump.c		start of a dump, its images, its report
 *   track.c		the soft-dirty bits of its tree
 *   engine_dump.c	the same of a container, by its engine
 *   prepare.c		the commit of a move (move.h)
 *   container.c		that of a container's move
 *   archive.c		the container's archive, on its way to the host
 *   progress.c		detection of a stalled CRIU
 */
#ifndef OVR_RESTORE_H
#define OVR_RESTORE_H

#include "agent.h"
#include "move.h"

enum phase {
	IDLE,
	UPLOADING, /* the host sends image files */
	BUILDING,  /* CRIU runs, up to its hook */
	TRACKING,  /* dump: CRIU waits before it stops the tree, for the host to look at it */
	SAVING,    /* dump: CRIU waits for its hook, its images are sent to the host */
	HELD,      /* CRIU waits for its hook, with the whole tree */
	PREPARED,  /* the tree of a move is frozen in cgroups, until Go or Abort */
	PACKING,   /* the same, of a container: CRIU lets it go, podman writes its archive */
	REMOVING,  /* Go received: podman removes the container, or it is PREPARED again */
	RELEASED,  /* Go received: CRIU detaches (dump: or kills the tree) and exits */
	ENDING, /* after an abort: an engine removes its container, a dump lets the tree run on */
};

struct restore {
	enum phase phase;
	struct session *owner; /* NULL once its session has ended */
	struct directory directory;
	int listener, hook;
	pid_t child; /* CRIU, or an engine that starts it, or a cleanup step */
	pid_t criu, root;
	bool engine, dump;
	bool podman;        /* it is the engine of a dump */
	bool tracked;       /* the host has let CRIU stop the tree */
	bool leave_running; /* a dump's tree is to run on after Go */
	int64_t tracking_since;
	pid_t dumped;              /* root of the tree */
	bool dump_locks;           /* CRIU locks the tree's network, or freezes its cgroup */
	bool dump_released;        /* CRIU was told to end the tree */
	struct engine_criu theirs; /* the engine's CRIU, once its hook has connected */
	bool criu_end_seen;        /* by the loop, which would be woken for ever */
	bool child_ended, keep_log, warm, engine_killed;
	bool grace; /* silence is not declared before unread input was read */
	int child_status;
	int64_t silence_ms, silent_at, late_at; /* late_at: LLONG_MAX is no limit */
	int64_t stall_ms;
	int step;               /* ENDING: next cleanup step */
	char move[MOVE_ID + 1]; /* empty: no move; of a dump, none that is prepared */
	bool adopted;           /* prepared by an earlier agent */
	bool move_damaged;      /* some of its tasks are not in their own cgroups */
	bool container;  /* a prepared tree: podman is to end it, by removing its container */
	bool packed;     /* CRIU and podman have let it go */
	bool decided;    /* Go was received: no Abort any more */
	int64_t dead_by; /* RELEASED: when the tasks of a prepared move must have died, or 0 */
};

/* restore.c */
extern struct restore restore;
/* Refuse messages in the wrong phase. Ends the session: the host may have sent more of them. */
bool restore_in_phase(struct session *session, enum phase phase);
/* Enter BUILDING: a program that ends in CRIU's hook was started. */
void restore_building(const struct message *begin);
/* Report that no program could be started. */
void restore_refuse_start(struct session *session, int error);
/* Return to IDLE. Frees all but the restored tree, and the log if keep_log is set. */
void restore_forget(void);

/* restore_hook.c */
bool hook_listen(void);
void hook_watch(struct loop *loop);
/* Report the held tree to the host. */
void hook_report_stopped(void);
/* Reset the priorities of CRIU and the tree. */
void hook_reset_priorities(void);
/* Answer the hook; false if it is gone. */
bool hook_say(char word);

/* restore_end.c */
/* The host commits. */
void restore_go(struct session *session);
/* Let CRIU go, and a container's archive come: PACKING. */
void restore_pack(void);
/* Tasks of a prepared tree do not die. */
void restore_lives_on(void);
bool restore_criu_ended(void);
/* Whether restore.child has exited, and all that a dump's engine has started or sent. */
bool restore_all_ended(void);
/* The restore's tree, as far as it is known. */
struct tree restore_tree(void);
/* Kill the tree and tell the host why. */
void restore_abort(enum code code, const char *reason);
/* Handle the exit of restore.child. */
void restore_child_ended(void);
/* ENDING takes too long. */
void restore_end_too_late(void);

/* dump.c */
void dump_freeze(struct session *session);
void dump_track(struct session *session, const struct message *message);
/* CRIU's first pre-dump hook waits for an answer. */
void dump_starts(void);
/* Called by track.c. */
void dump_frozen(void);
void dump_tracked(uint64_t frozen_us);
void dump_begin(struct session *session, const struct message *message);
void dump_fetch(struct session *session, const struct message *message);
/* Send a piece of the file `name`: at most DUMP_PIECE bytes. */
#define DUMP_PIECE (CHUNK / 2)
void dump_send(const char *name, const uint8_t *data, size_t size);
/* Send images as long as the session has room; then report the tree. */
void dump_send_images(void);
/* Whether the tree is whole after CRIU's exit. */
bool dump_is_whole(void);
/* Whether the tree of a container runs after Go: CRIU gave up at last, or was to leave it running. */
bool dump_runs_on(void);
void dump_report_success(void);
/* Send CRIU's statistics, if they are there. */
void dump_report_stats(struct session *session);
void dump_forget(void);

/* track.c */
/* Clear soft-dirty bits of a tree. If the host is to `look` at them it is frozen before. */
bool track_begin(pid_t root, bool look);
bool track_under_way(void);
bool track_may_look(void);
/* The host has looked. */
void track_looked(void);
/* End it; a frozen tree runs on. */
void track_end(void);
bool track_reaped(pid_t pid);
void track_watch(struct loop *loop);

/* engine_dump.c */
/* CRIU is about to succeed: take away what nobody is to restore from podman's directory. */
void engine_strip_images(const struct directory *directory);
/* Remove the images from podman's directory. */
void engine_remove_images(const struct directory *directory);

/* archive.c */
bool archive_open(const char *path);
void archive_forget(void);
void archive_watch(struct loop *loop);
/* podman has ended: whether the rest is sent. */
bool archive_is_sent(void);
/* Whether the host has to be there for it. */
bool archive_is_awaited(void);
/* It is not: the rest is lost. */
void archive_host_is_silent(void);

/* progress.c */
/* Watch restore.child and its descendants: they are stalled if nothing changes for this long. */
void progress_begin(int64_t period_ms);
bool progress_stalled(void);
/* When to call progress_stalled() again. */
int64_t progress_look_at(void);

#endif
